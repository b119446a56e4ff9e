"""Text to padded token batches, the one form in which training and evaluation see text.

A batch is a dict of int64 tensors, each [rows, length]: `input_ids`, `attention_mask` (1 = real
token) and `labels` (the token id where it is scored, -100 elsewhere). Padding is on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Row = tuple[list[int], list[int]]  # input ids and labels of one text


def encode(tokenizer, prompt: str, answer: str, ends: bool = True) -> Row:
    """One question and answer; only the answer and, if it `ends`, the end token are scored."""
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    said = tokenizer(answer, add_special_tokens=False).input_ids
    said = [*said, tokenizer.eos_token_id] if ends else said
    return asked + said, [-100] * len(asked) + said


def pad(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows of any lengths -> one batch."""
    width = max(len(ids) for ids, _ in rows)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    batch = {key: torch.full((len(rows), width), value) for key, value in fill.items()}
    for i, (ids, labels) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, : len(labels)] = torch.tensor(labels)
    return batch


def pad_to_budget(rows: Iterable[Row], tokens: int, pad_id: int) -> list[Batch]:
    """Cut rows, in order, into batches of at most `tokens` positions, padding counted.

    Rows are not sorted by length: on the mixed task 89 % of the positions hold a real token
    anyway, and sorting would make every batch a batch of one task.
    """
    batches: list[Batch] = []
    group: list[Row] = []
    for row in rows:
        width = max(len(ids) for ids, _ in [*group, row])
        if group and width * (len(group) + 1) > tokens:
            batches.append(pad(group, pad_id))
            group = []
        group.append(row)
    return [*batches, pad(group, pad_id)] if group else batches
