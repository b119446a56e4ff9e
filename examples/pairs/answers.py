"""Greedy answers of a causal model to questions, and how many of them are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> list[str]:
    """Generate greedily after each prompt, up to the end token, and strip spaces.

    Prompts are used as they are (no special tokens are added): apply the chat template first.
    """
    answers = []
    for start in range(0, len(prompts), batch_size):
        # Left padding: generation continues at the right end of every row.
        inputs = tokenizer(
            list(prompts[start : start + batch_size]),
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        ).to(model.device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        said = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    return answers


def exact_match(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> float:
    """Count the prompts whose greedy answer is exactly the expected one, as a share of 0 to 1."""
    if not prompts or len(prompts) != len(answers):
        raise ValueError(
            f"{len(prompts)} prompts and {len(answers)} answers; give one answer for each prompt"
        )
    said = greedy_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
    return sum(a == b.strip() for a, b in zip(said, answers, strict=True)) / len(answers)
