"""q/k/v and gate/up share a launch, and nothing else changes."""

from __future__ import annotations

import copy

import deltamix_kernels as dk
import pytest
import torch
from tiny_pairs import logits, token_ids

from deltamix_hf import siblings
from deltamix_hf.kernels import REFERENCE, TRITON, VARIABLE
from deltamix_hf.modules import delta_modules

IDS = token_ids(2, 5)


@pytest.fixture
def model(delta, monkeypatch):
    """A saved llama delta, loaded anew, its packed products by Triton."""
    repo = delta("llama", "deltamix-kl")
    found = repo.pair.load(repo.folder)
    monkeypatch.setenv(VARIABLE, TRITON)
    return found


@pytest.fixture
def launches(monkeypatch):
    """How many matrices each shrink launch had."""
    counted = []
    plain = dk.shrink

    def shrink(x, matrices, *rest):
        counted.append(len(matrices))
        return plain(x, matrices, *rest)

    monkeypatch.setattr(dk, "shrink", shrink)
    monkeypatch.setattr(dk.launch, "shrink", shrink)
    return counted


def groups(model):
    found = [m.dm_siblings for m in delta_modules(model).values() if hasattr(m, "dm_siblings")]
    return {id(group): group for group in found if group is not None}.values()


def test_fewer_launches_and_the_same_logits(model, launches, monkeypatch):
    members = [len(group.members) for group in groups(model)]
    assert members and all(size in (2, 3) for size in members)
    with torch.no_grad():
        found = logits(model, IDS)
        assert sorted(n for n in launches if n > 1) == sorted(members)
        again = logits(model, IDS)
    assert torch.equal(found, again)
    assert all(group._x is None and group._h is None for group in groups(model))
    monkeypatch.setenv(VARIABLE, REFERENCE)
    with torch.no_grad():
        expected = logits(model, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_take_the_single_path(model, launches):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert set(launches) == {1} and embedded.grad is not None


def test_another_tensor_dissolves_the_group_in_time(model, launches):
    group = next(iter(groups(model)))
    one, other = group.members[:2]
    x = torch.randn(2, one.in_features)
    with torch.no_grad():
        expected = [layer(x) for layer in (one, other)]
        for _ in range(siblings._MOST_MISSES + 1):  # each with a tensor of its own
            for layer, y in zip((one, other), expected, strict=True):
                assert torch.equal(layer(x.clone()), y)
    assert one.dm_siblings is None and other.dm_siblings is None


def test_a_copy_has_groups_of_its_own(model):
    twin = copy.deepcopy(model)
    for ours, theirs in zip(groups(model), groups(twin), strict=True):
        assert not {id(m) for m in ours.members} & {id(m) for m in theirs.members}
    with torch.no_grad():
        assert torch.equal(logits(model, IDS), logits(twin, IDS))


def test_compiled_whole(model):
    torch.compiler.reset()
    with torch.no_grad():
        expected = logits(model, IDS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, IDS), expected, rtol=1e-5, atol=1e-5)
