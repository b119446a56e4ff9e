"""Cached merged weights: the dense product, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from tiny_pairs import logits, snapshot, token_ids

from deltamix_hf import DeltaMixError, cache_merged
from deltamix_hf.nn.layers import delta_modules, weight_of

IDS = token_ids(2, 5)


@pytest.fixture(params=["llama", "llama_tied", "bert"])
def repo(delta, request):
    return delta(request.param, "deltamix-kl")


@torch.no_grad()
def test_it_is_the_dequantized_model(repo, tmp_path):
    model = repo.pair.load(repo.folder)
    packed = logits(model, IDS)
    names = set(model.state_dict())
    matrices = {id(weight_of(m)): weight_of(m) for m in delta_modules(model).values()}
    assert cache_merged(model) == sum(4 * weight.numel() for weight in matrices.values())
    found = logits(model, IDS)
    torch.testing.assert_close(found, packed, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, packed)  # another order of sums: the cache was used

    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(repo.folder)

    assert cache_merged(model, enabled=False) == 0
    assert torch.equal(logits(model, IDS), packed)
    cache_merged(model)
    dense = model.dequantize()
    assert torch.equal(logits(dense, IDS), found)


@torch.no_grad()
def test_it_moves_and_casts_with_the_model(repo):
    model = repo.pair.load(repo.folder)
    cache_merged(model)
    model.to(torch.bfloat16)
    modules = list(delta_modules(model).values())
    assert all(m.merged().dtype == m.weight.dtype == torch.bfloat16 for m in modules)
    assert logits(model, IDS).isfinite().all()


def test_gradients_flow_to_inputs(repo):
    model = repo.pair.load(repo.folder)
    module = next(m for m in delta_modules(model).values() if isinstance(m, torch.nn.Linear))
    grads = []
    for enabled in (False, True):
        cache_merged(model, enabled)
        x = torch.ones(2, module.in_features, requires_grad=True)
        module(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_offloaded_models_are_refused(repo):
    model = repo.pair.load(repo.folder)
    name, module = next(iter(delta_modules(model).items()))
    weight = module.weight
    module.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(DeltaMixError, match=f"{name} is offloaded"):
        cache_merged(model)
    assert all(m.merged() is None for m in delta_modules(model).values())
