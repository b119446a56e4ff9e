"""Text that a fine-tune writes itself, with a chat template, without one, and with a bad one."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_pairs import make_tokenizer

from deltamix_hf import DeltaMixError
from deltamix_hf.calibration.self_text import SELF_LENGTH, _user_opening, self_texts

# A turn is opened by w10 (user) or w11 (assistant), and closed by w12.
CHAT = (
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} w12 "
    "{% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)
REFUSES = "{{ raise_exception('the first turn must be the system\\'s') }}"
DROPS = "w10 w12"


@pytest.fixture(scope="module")
def model(pair):
    return pair("llama").load(pair("llama").tuned)


def tokenizer(template=None):
    made = make_tokenizer()
    made.chat_template = template
    return made


def test_a_chat_model_asks_and_answers(model):
    rows = self_texts(model, tokenizer(CHAT), 5, seed=0)
    assert len(rows) == 5
    for row in rows:
        assert row[0] == 10 and 11 in row[:-1]  # opened as the user's, then answered
        assert len(row) <= SELF_LENGTH + 3  # w10, w12, w11
    assert rows == self_texts(model, tokenizer(CHAT), 5, seed=0)
    assert rows != self_texts(model, tokenizer(CHAT), 5, seed=1)


def test_another_model_continues_random_tokens(model):
    rows = self_texts(model, tokenizer(), 40, seed=0)  # two batches
    assert len(rows) == 40 and len({row[0] for row in rows}) > 20
    assert all(2 <= len(row) <= SELF_LENGTH for row in rows)


def test_a_larger_tokenizer_does_not_ask_for_tokens_that_the_model_lacks(model):
    made = tokenizer()
    made.add_tokens([f"new{i}" for i in range(3000)])
    vocabulary = model.get_input_embeddings().num_embeddings
    assert max(max(row) for row in self_texts(model, made, 8, seed=0)) < vocabulary


@pytest.mark.parametrize("template", [REFUSES, DROPS], ids=["refuses", "drops the text"])
def test_a_template_that_cannot_open_a_turn_is_not_used(model, template, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert _user_opening(tokenizer(template)) == []
    assert ("must be the system's" in caplog.text) == (template == REFUSES)
    assert len(self_texts(model, tokenizer(template), 2, seed=0)) == 2


def test_only_a_causal_model_writes(pair):
    other = pair("bert").load(pair("bert").tuned)
    with pytest.raises(DeltaMixError, match="BertForMaskedLM"):
        self_texts(other, tokenizer(), 2, seed=0)
    assert torch.is_grad_enabled()
