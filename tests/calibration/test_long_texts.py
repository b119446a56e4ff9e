"""Texts as long as a model's positions, whatever way it has of saying how many these are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_pairs import Family, Pair, logits, make_pair, make_tokenizer, quick, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LEDForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from deltamix_hf.calibration.self_text import longest_text, self_texts

# A turn is opened by w10 (user) or w11 (assistant), and closed by w12.
CHAT = (
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} w12 "
    "{% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)
HALVES = {
    f"{half}_{name}": number
    for half in ("encoder", "decoder")
    for name, number in {"layers": 1, "ffn_dim": 128, "attention_heads": 4}.items()
}
LAYERS = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZE = {"vocab_size": 256}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def xlnet() -> PreTrainedModel:
    return XLNetLMHeadModel(XLNetConfig(**SIZE, d_model=64, n_layer=1, n_head=4, d_inner=128))


def opt() -> PreTrainedModel:
    sizes = {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**SIZE, **LAYERS, **SPECIAL, **sizes))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 48}
    return GPT2LMHeadModel(GPT2Config(**SIZE, **sizes, **SPECIAL))


def roberta() -> PreTrainedModel:
    sizes = {"intermediate_size": 128, "max_position_embeddings": 67}
    return RobertaForMaskedLM(RobertaConfig(**SIZE, **LAYERS, **SPECIAL, **sizes))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(**SIZE, **sizes, n_positions=0, decoder_start_token_id=0)
    )


def bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(**SIZE, **HALVES, **SPECIAL, d_model=64, max_position_embeddings=64)
    )


def led() -> PreTrainedModel:
    longest = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 64}
    sizes = {"d_model": 64, "attention_window": 16}
    return LEDForConditionalGeneration(LEDConfig(**SIZE, **HALVES, **SPECIAL, **longest, **sizes))


CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
CASES = {
    "xlnet": (xlnet, CAUSAL, None),
    "opt": (opt, CAUSAL, 64),
    "gpt2": (gpt2, CAUSAL, 48),
    "roberta": (roberta, MASKED, 64),
    "t5": (t5, SEQ2SEQ, None),
    "bart": (bart, SEQ2SEQ, 64),
    "led": (led, SEQ2SEQ, 64),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Pair]:
    pairs: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in pairs:
            build, auto, _ = CASES[name]
            family = Family(build, auto, {"ratio": 0.5})
            pairs[name] = make_pair(name, tmp_path_factory.mktemp(name), family)
            tokenizer = make_tokenizer()
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(pairs[name].tuned)
        return pairs[name]

    return get


@pytest.mark.untraced
@pytest.mark.parametrize("name", CASES)
def test_texts_of_any_length(made, tmp_path, name):
    """Compressed on texts longer than any of them takes, saved, reloaded, the fine-tune nearly."""
    pair, most = made(name), CASES[name][2]
    texts = [" ".join(f"w{i}" for i in row) for row in token_ids(4, 200).tolist()]
    model = pair.compress(calibration=texts, **quick("deltamix-kl"))
    assert longest_text(model) == most
    assert model.config.quantization_config.seq_length == (most or 2048)
    model.save_pretrained(tmp_path / "delta")
    again = pair.load(tmp_path / "delta")
    assert torch.equal(logits(again), logits(model))
    base = (logits(pair.load(pair.base)) - pair.logits).norm()
    assert (logits(again) - pair.logits).norm() < 0.5 * base


@pytest.mark.parametrize("name", ["xlnet", "opt", "gpt2"])
@pytest.mark.parametrize("turns", ["none", "short", "long", "longer than the positions"])
def test_written_texts_fit(made, name, turns):
    pair, most = made(name), CASES[name][2]
    tokenizer = make_tokenizer()
    system = {"none": 0, "short": 0, "long": 20, "longer than the positions": 70}[turns]
    tokenizer.chat_template = None if turns == "none" else "w9 " * system + CHAT
    rows = self_texts(pair.load(pair.tuned), tokenizer, 3, seed=0)
    assert len(rows) == 3 and all(2 <= len(row) <= (most or 128 + system + 3) for row in rows)
    if turns == "long" and name == "opt":
        assert all(row[:20] == [9] * 20 and 11 in row for row in rows)  # asked and answered


@pytest.mark.parametrize("name", ["xlnet", "opt"])
def test_compressed_on_what_it_writes(made, tmp_path, name):
    pair = made(name)
    model = pair.compress(calibration="self", **quick("deltamix-kl"))
    model.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(pair.load(tmp_path / "delta")), logits(model))
