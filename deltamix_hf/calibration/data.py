"""Calibration text: token batches from whatever the user gave."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DeltaMixConfig
from ..errors import DeltaMixError

SELF = "self"  # calibration on text that the fine-tune writes
_RANDOM_LENGTH = 128
_TOKENS_PER_FORWARD = 2048  # rows of a token tensor run together up to this many tokens


def no_text_given(config: DeltaMixConfig) -> bool:
    """Whether what the fine-tune was made for is unknown: no data, or only what it wrote itself."""
    data = config.calibration
    return data is None or (isinstance(data, str) and data == SELF)


def describe(config: DeltaMixConfig) -> str:
    """The calibration data in a few words, for config.json and the model card.

    Text that the fine-tune is to write is described once it is there.
    """
    data = config.calibration
    if no_text_given(config):
        return "weights alone"
    if isinstance(data, Tensor):
        rows, length = data[: config.num_samples, : config.seq_length].shape
        return f"token ids [{rows}, {length}]"
    count = f"at most {config.num_samples} texts of {config.seq_length} tokens"
    return f"{count} of {data}" if isinstance(data, str) else count


def token_batches(config: DeltaMixConfig, load_tokenizer: Callable[[], Any]) -> list[Tensor]:
    """Token ids int64 [rows, length] per batch; the tokenizer is only loaded for texts.

    Raises:
        DeltaMixError: the data set cannot be read, or no tokens are left.
    """
    data = config.calibration
    if isinstance(data, Tensor):
        ids = data[: config.num_samples, : config.seq_length].long()
        return list(split_rows(ids))
    texts = _read_texts(data) if isinstance(data, str) else list(data or ())
    texts = [text for text in texts if text and text.strip()]
    random.Random(config.seed).shuffle(texts)
    tokenizer = load_tokenizer()
    chosen = texts[: config.num_samples]
    rows = [
        tokenizer(t, truncation=True, max_length=config.seq_length)["input_ids"] for t in chosen
    ]
    return stacked(rows, config.seed)


def random_tokens(vocabulary: int, config: DeltaMixConfig) -> list[Tensor]:
    """Uniformly random token ids, for models that could write text but have no tokenizer."""
    generator = torch.Generator().manual_seed(config.seed)
    length = min(config.seq_length, _RANDOM_LENGTH)
    ids = torch.randint(vocabulary, (config.num_samples, length), generator=generator)
    return list(split_rows(ids))


def split_rows(ids: Tensor, tokens: int = _TOKENS_PER_FORWARD) -> tuple[Tensor, ...]:
    """Token ids [rows, length] in pieces of at most `tokens` tokens, or of one row."""
    return ids.split(max(1, tokens // ids.shape[1]))


def stacked(rows: Sequence[list[int]], seed: int) -> list[Tensor]:
    """Batches of rows of equal length, so that nothing is padded, in an order drawn by `seed`.

    Raises:
        DeltaMixError: no row holds a token.
    """
    same_length: dict[int, list[list[int]]] = {}
    for ids in rows:
        same_length.setdefault(len(ids), []).append(ids)
    same_length.pop(0, None)
    if not same_length:
        raise DeltaMixError(
            "calibration gave no tokens; give non-empty texts, or None for data-free"
        )
    batches = [batch for group in same_length.values() for batch in split_rows(torch.tensor(group))]
    random.Random(seed).shuffle(batches)
    return batches


def _read_texts(name: str) -> list[str]:
    """Texts of a local .txt / .jsonl file, or the "text" column of a data set's train split."""
    if os.path.isfile(name):
        return _read_file(Path(name))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DeltaMixError(
            f"calibration={name[:80]!r} is no local file, and data sets need `pip install datasets`"
        ) from error
    try:
        return list(load_dataset(name, split="train")["text"])
    except Exception as error:
        raise DeltaMixError(
            f"cannot read a train split with a 'text' column from data set {name[:80]!r}: "
            f"{str(error)[:300]}"
        ) from error


def _read_file(path: Path) -> list[str]:
    """Lines of a text file, or the "text" of each line of a .jsonl file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaMixError(f"cannot read calibration texts from {path}: {error}") from error
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DeltaMixError(f'{path}, line {number}, is not of the form {{"text": "..."}}')
        texts.append(row["text"])
    return texts
