"""Batched greedy answers against decoding token by token."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from pairs.answers import exact_match, greedy_answers

TOKENIZER = ByT5Tokenizer(extra_ids=0)


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    # a large range of weights, so that two models really disagree
    return LlamaForCausalLM(LlamaConfig(**sizes, **layers, **ids, initializer_range=0.2)).eval()


A, B = llama(0), llama(1)

# Answers of random models are bytes; these prompts, of many lengths, are made of letters.
PROMPTS = ["a", "what is this", "ten plus two", "hello", "a much longer prompt than the others"]


def one_by_one(model) -> list[str]:
    """Greedy answers without batching, padding or generate()."""
    answers = []
    for prompt in PROMPTS:
        ids = TOKENIZER(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        start = ids.shape[1]
        while ids.shape[1] < start + 6 and ids[0, -1] != 1:
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(TOKENIZER.decode(ids[0, start:], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_do_not_depend_on_batching(batch_size):
    said = greedy_answers(A, TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=batch_size)
    assert said == one_by_one(A)


def test_exact_match_counts_equal_answers():
    answers = one_by_one(A)
    assert exact_match(A, TOKENIZER, PROMPTS, answers, max_new_tokens=6) == 1
    answers[1] += "!"
    assert exact_match(A, TOKENIZER, PROMPTS, answers, max_new_tokens=6) == 0.8
    assert exact_match(B, TOKENIZER, PROMPTS, answers, max_new_tokens=6) == 0


def test_as_many_answers_as_prompts():
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        exact_match(A, TOKENIZER, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="0 prompts"):
        exact_match(A, TOKENIZER, [], [])
