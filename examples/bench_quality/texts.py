"""Calibration data that is not the pair's own, and pairs whose delta is made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from pairs.pair import Pair, Question, cache_root, save_model, write_info, write_rows
from pairs.pocket import python_files
from real_pairs import build_pair
from torch import Tensor
from transformers import AutoModelForCausalLM

LINES = 8  # lines of source in a window: 4 are read, 4 predicted
RELATIVE = 0.02  # ‖ΔW‖ / ‖W_base‖ of every matrix of a made-up delta


def calibration_data(pair: Pair, kind: str) -> list[str] | str | None:
    """What `DeltaMixConfig(calibration=...)` gets; with None, a language model writes its own.

    "mismatched" is source code for a language model; an encoder gets its own texts with the
    characters of each shuffled.
    """
    if kind == "none":
        return None
    texts = pair.texts("calibration")
    if kind == "matched":
        return texts
    if pair.rows("calibration", 1)[0]["answer"] is not None:
        return [prompt + (answer or "") for prompt, answer in source_windows()[: len(texts)]]
    generator = random.Random(0)
    return ["".join(generator.sample(text, len(text))) for text in texts]


@cache
def source_windows(count: int = 800, seed: int = 0) -> list[Question]:
    """Windows of the standard library's source, no two of them overlapping."""
    windows = []
    for text in python_files():
        lines = [line for line in text.splitlines(keepends=True) if line.strip()]
        for start in range(0, len(lines) - LINES + 1, LINES):
            half = start + LINES // 2
            windows.append(("".join(lines[start:half]), "".join(lines[half : start + LINES])))
    return random.Random(seed).sample(windows, count)


def _noise(weight: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, generator=random)


def _lora(weight: Tensor, random: torch.Generator, rank: int = 8) -> Tensor:
    m, n = weight.shape
    return torch.randn(m, rank, generator=random) @ torch.randn(rank, n, generator=random)


def _sparse(weight: Tensor, random: torch.Generator, share: float = 0.01) -> Tensor:
    mask = torch.rand(weight.shape, generator=random) < share
    return mask * torch.randn(weight.shape, generator=random)


DELTAS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "pocket-noise": _noise,
    "pocket-lora": _lora,
    "pocket-sparse": _sparse,
}


def get_pair(name: str) -> Pair:
    """A real pair, or one of `DELTAS` on the pocket base; made on the first call, then cached."""
    return _synthetic(name) if name in DELTAS else build_pair(name)


def _synthetic(name: str) -> Pair:
    """Every matrix changed by 2 % of its norm; judged on source code, which the base knows."""
    folder: Path = cache_root() / name
    pair = Pair(name, build_pair("pocket-shakespeare").base, folder / "finetuned")
    if pair.complete:
        return pair
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                delta = DELTAS[name](weight, generator)
                weight.add_(delta * (RELATIVE * weight.norm() / delta.norm()))
    tokenizer = Pair(name, pair.base, pair.base).tokenizer()
    save_model(model, tokenizer, pair.finetuned)
    windows = source_windows()
    write_rows(folder / "heldout.jsonl", windows[:192])
    write_rows(folder / "calibration.jsonl", windows[192:])
    write_info(pair, base="pocket-base", relative_delta=RELATIVE, exact_match=False)
    return pair
