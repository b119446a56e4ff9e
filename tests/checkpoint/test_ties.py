"""Ties that differ between config.json, the base's file and the fine-tune's: right, or refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pairs import fine_tune, logits, make_config, relative, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.nn.delta_module import DeltaModule
from deltamix_hf.nn.layers import weight_of

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(tied):
    config = LlamaConfig(**SIZES, intermediate_size=128, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def gpt2(tied):
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config)


@pytest.fixture(params=[llama, gpt2])
def make(request):
    torch.manual_seed(0)
    return request.param


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compressed(tmp_path, ratio=3 / 4):
    config = make_config(tmp_path / "base", "delta-come", **{"ratio": ratio})
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "tuned", quantization_config=config, dtype=torch.float32
    )


def test_a_tied_fine_tune_of_an_untied_base_is_refused(make, tmp_path):
    base = make(False)
    base.save_pretrained(tmp_path / "base")
    fine_tune(base)
    base.get_output_embeddings().weight = base.get_input_embeddings().weight
    base.config.tie_word_embeddings = True
    base.save_pretrained(tmp_path / "tuned")
    with pytest.raises(DeltaMixError, match="holds two tensors that differ: save the fine-tune"):
        compressed(tmp_path)
    config = make_config(tmp_path / "base", "delta-come", **{"ratio": 3 / 4})
    with pytest.raises(DeltaMixError, match="holds two tensors that differ: save the fine-tune"):
        compress_streaming(tmp_path / "tuned", tmp_path / "delta", config)


def test_a_base_that_stores_a_tie_twice_is_tied(make, tmp_path):
    base = make(True)
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    table = base.get_input_embeddings().weight.detach()
    save_file({**tensors, "lm_head.weight": table.clone()}, file, {"format": "pt"})
    fine_tune(base)
    base.save_pretrained(tmp_path / "tuned")
    compressed(tmp_path).save_pretrained(tmp_path / "delta")
    found = load(tmp_path / "delta")
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight


def test_a_head_that_only_the_file_unties_comes_back(make, tmp_path):
    """As of old T5 v1.1 checkpoints: config.json says tied, the file holds a head."""
    base = make(True)
    base.save_pretrained(tmp_path / "base")
    fine_tune(base)
    base.save_pretrained(tmp_path / "tuned")
    file, head = tmp_path / "tuned/model.safetensors", torch.randn(256, 64) / 8
    save_file({**load_file(file), "lm_head.weight": head}, file, {"format": "pt"})
    ids = token_ids(2, 7)
    model = compressed(tmp_path)
    model.save_pretrained(tmp_path / "delta")
    found = load(tmp_path / "delta")
    assert torch.equal(found.get_output_embeddings().weight, head)
    assert not found.config.tie_word_embeddings
    torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    beside = load(tmp_path / "base")
    with pytest.raises(DeltaMixError, match="ties to another: use it by itself"):
        beside.load_delta(tmp_path / "delta", "untied")
    assert isinstance(beside.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_head_trained_on_from_the_base_s_embeddings_is_packed(make, tmp_path, streamed):
    base = make(True)
    base.save_pretrained(tmp_path / "base")
    base.config.tie_word_embeddings = False
    table = base.get_input_embeddings().weight.detach().clone()
    base.get_output_embeddings().weight = nn.Parameter(table.clone())
    fine_tune(base)
    base.save_pretrained(tmp_path / "tuned")
    ids, folder = token_ids(2, 7), tmp_path / "delta"
    if streamed:
        config = make_config(tmp_path / "base", "delta-come", **{"ratio": 1 / 2})
        compress_streaming(tmp_path / "tuned", folder, config)
    else:
        compressed(tmp_path, 1 / 2).save_pretrained(folder)
    found = load(folder)
    head = found.get_output_embeddings()
    assert isinstance(head, DeltaModule) and torch.equal(weight_of(head).float(), table)
    assert relative(logits(found, ids), logits(load(tmp_path / "tuned"), ids)) < 0.1
    assert all(check.problem is None for check in verify_repo(str(folder)))
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(found, ids))
    with pytest.raises(DeltaMixError, match="ties to another: use it by itself"):
        load(tmp_path / "base").load_delta(folder, "untied")


def test_an_untied_head_like_the_embeddings_comes_back(make, tmp_path):
    base = make(True)
    base.save_pretrained(tmp_path / "base")
    base.config.tie_word_embeddings = False
    table = base.get_input_embeddings().weight.detach().clone()
    fine_tune(base)
    base.get_input_embeddings().weight.data = table.clone()
    base.get_output_embeddings().weight = nn.Parameter(table.clone())
    base.save_pretrained(tmp_path / "tuned")
    compressed(tmp_path).save_pretrained(tmp_path / "delta")
    found = load(tmp_path / "delta")
    assert torch.equal(found.get_output_embeddings().weight, table)
    assert found.get_output_embeddings().weight is not found.get_input_embeddings().weight
