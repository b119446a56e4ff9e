"""Weights that are in memory only while the module that owns them runs."""

from __future__ import annotations

import pytest
import torch
from tiny_pairs import logits, token_ids
from torch import nn

from deltamix_hf.checkpoint.base import BaseCheckpoint
from deltamix_hf.jobs.weight_access import LazyWeights, unloaded


def open_lazy(source, overlay=None):
    """A fine-tune without weights, what gives it them, and the same fine-tune in memory."""
    whole = source.load(source.tuned).eval()
    model = unloaded(type(whole), whole.config)
    tuned, base = (
        BaseCheckpoint([str(folder / "model.safetensors")], model)
        for folder in (source.tuned, source.base)
    )
    return model, LazyWeights(model, tuned, base, torch.device("cpu"), overlay or {}), whole


def in_memory(model):
    return {name for name, p in model.named_parameters() if p.device.type != "meta"}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "t5"])
def test_runs_like_the_model_in_memory(pair, name):
    model, _, whole = open_lazy(pair(name))
    assert torch.equal(logits(model), logits(whole))
    assert not in_memory(model)


def test_one_block_at_a_time(pair):
    model, _, _ = open_lazy(pair("llama"))
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: seen.append(in_memory(model)))
    logits(model)
    assert len(seen) == 2 * 7 + 1
    blocks = [
        {name.split(".layers.")[1][0] for name in names if ".layers." in name} for names in seen
    ]
    assert all(len(held) <= 1 for held in blocks)
    assert seen[-1] == {"lm_head.weight"}


def test_weights_are_given_back_when_a_block_fails(pair):
    model, _, _ = open_lazy(pair("llama"))
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert not in_memory(model)


def test_held_weights_stay(pair):
    model, weights, _ = open_lazy(pair("llama"))
    block = model.model.layers[0]
    with weights.hold(block):
        logits(model)
        assert in_memory(model) == {f"model.layers.0.{n}" for n, _ in block.named_parameters()}
    assert not in_memory(model)


def test_what_replaces_the_files(pair):
    source = pair("llama")
    name, other = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    overlay = {other: torch.full((64,), 3.0)}
    model, weights, whole = open_lazy(source, overlay)
    weights.put_base(name)
    base = source.load(source.base)
    with torch.no_grad():
        whole.get_parameter(name).copy_(base.get_parameter(name))
        whole.get_parameter(other).copy_(overlay[other])
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_backward_pass_reads_weights_again(pair, name):
    model, weights, whole = open_lazy(pair(name))
    whole.requires_grad_(False)
    reads = []
    read = weights.read
    weights.read = lambda name: reads.append(name) or read(name)
    gradients = []
    for m in (model, whole):
        x = m.get_input_embeddings()(token_ids()).detach().requires_grad_()
        with weights.forgotten():
            loss = m(inputs_embeds=x).logits.square().sum()
        before = len(reads)
        if m is model:
            assert not in_memory(model)
        loss.backward()
        if m is model:
            assert len(reads) > before
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
