"""Calibration: token batches from whatever the user gave, and input Grams C = X·Xᵀ/N.

C [n, n] of a linear layer is the mean of x·xᵀ over all calibration tokens, taken from the
uncompressed fine-tune in one forward pass over the data. Layers that read the same tensor
(q/k/v, gate/up) share one Gram: it is computed once and the dict entries alias it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import DeltaMixConfig
from .errors import DeltaMixError

_TOKENS_PER_FORWARD = 2048  # rows of a token tensor run together up to this many tokens


def describe(config: DeltaMixConfig) -> str:
    """The calibration data in a few words, for config.json and the model card."""
    data = config.calibration
    if data is None:
        return "data-free"
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
        return list(ids.split(max(1, _TOKENS_PER_FORWARD // ids.shape[1])))
    texts = _read_texts(data) if isinstance(data, str) else list(data or ())
    texts = [text for text in texts if text and text.strip()]
    random.Random(config.seed).shuffle(texts)
    tokenizer = load_tokenizer()
    batches = []
    for text in texts[: config.num_samples]:
        ids = tokenizer(text, truncation=True, max_length=config.seq_length)["input_ids"]
        if ids:
            batches.append(torch.tensor([ids]))
    if not batches:
        raise DeltaMixError(
            "calibration gave no tokens; give non-empty texts, or None for data-free"
        )
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


class _GramHooks:
    """Forward pre-hooks that accumulate Σ x·xᵀ of each module's input in float32."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.alias: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()
        ]

    def _hook(self, name: str):
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            # q/k/v and gate/up are called with the very same tensor object, one after the other
            if name in self.alias or (self._last and self._last[0] is x and name not in self.sums):
                self.alias.setdefault(name, self._last[1] if self._last else name)
                return
            self._last = (x, name)
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            if name not in self.sums:
                self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.counts[name] = 0
            self.sums[name].addmm_(rows.T, rows)
            self.counts[name] += len(rows)

        return accumulate

    def close(self) -> dict[str, Tensor]:
        for handle in self._handles:
            handle.remove()
        grams = {name: total.div_(self.counts[name]) for name, total in self.sums.items()}
        return grams | {name: grams[source] for name, source in self.alias.items()}


@torch.no_grad()
def input_grams(
    model: PreTrainedModel, modules: dict[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Name -> C float32 [n, n] for every module that was called; others are absent.

    Raises:
        DeltaMixError: the model gives NaN on the calibration data.
    """
    hooks = _GramHooks(modules)
    try:
        for ids in batches:
            ids = ids.to(model.device)
            inputs = {"input_ids": ids}
            if getattr(model.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            model(**inputs)
    finally:
        grams = hooks.close()
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise DeltaMixError(
                f"calibration gave NaN or infinite inputs to {name}: check the fine-tune"
            )
    return grams
