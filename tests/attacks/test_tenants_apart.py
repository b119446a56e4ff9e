"""Tenants of one running model: what one does must not reach another, nor outlive a refusal."""

from __future__ import annotations

import shutil

import pytest
import torch
from hostile import MODULE, WEIGHTS, edit_settings, edit_weights, refusal
from tiny_pairs import logits, token_ids

from deltamix_hf import DeltaMixError


@pytest.fixture
def serving(attack):
    """A model of our own with a tenant, and a sound repo that another will damage."""
    it = attack()
    model = it.pair.load(it.pair.base)
    model.load_delta(it.folder, "tenant")
    return it, model


def test_numbers_without_bound_stay_in_their_rows(serving):
    """Finite weights whose activations overflow: a mixed batch must not mix them."""
    it, model = serving
    ids = token_ids(3, 6)
    before = logits(model, ids, delta_names=["tenant", None, None])

    def change(tensors):
        tensors["model.norm.weight"].fill_(3e38)
        tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)

    edit_weights(it.folder, change)
    model.load_delta(it.folder, "attack")
    after = logits(model, ids, delta_names=["tenant", "attack", None])
    assert not torch.isfinite(after[1]).all()
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(after[2], before[2])


def test_files_changed_after_they_were_checked(serving):
    """A delta moved out of memory is read again, and checked again."""
    it, model = serving
    ids = token_ids(2, 6)
    good = shutil.copytree(it.folder, it.folder.parent / "good")
    model.load_delta(good, "good")
    model.set_delta("good")
    before = logits(model, ids)
    model.set_delta_memory(max(model.list_deltas().values()))  # "tenant" has to go
    model.set_delta_memory(None)
    assert list(model.delta_memory().resident) == ["good"]
    edit_weights(it.folder, lambda t: t[f"{MODULE}.dm_ranks"][:, 1:].fill_(0x7F80))
    for _ in range(2):
        refusal(lambda: logits(model, ids, delta_names=["tenant", "good"]), MODULE, "a scale")
        assert list(model.delta_memory().resident) == ["good"]
        assert torch.equal(logits(model, ids), before)
    (it.folder / WEIGHTS).unlink()
    refusal(lambda: logits(model, ids, delta_names=["tenant", "good"]), WEIGHTS)
    assert torch.equal(logits(model, ids), before)


def test_refused_while_others_run(serving):
    """Hundreds of refusals leave no memory and no class changed behind."""
    it, model = serving
    ids = token_ids(2, 6)
    before = logits(model, ids)
    classes = {name: type(module) for name, module in model.named_modules()}
    edit_settings(it.folder, group_size=64)
    for number in range(100):
        with pytest.raises(DeltaMixError):
            model.load_delta(it.folder, f"attack{number}")
    assert torch.equal(logits(model, ids), before)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.list_deltas()) == ["tenant"]
    assert list(model.delta_memory().resident) == ["tenant"]


@pytest.mark.parametrize("name", ["", "__base__", None, 5, ["x"], "tenant"], ids=repr)
def test_names_of_tenants(serving, name):
    it, model = serving
    refusal(lambda: model.load_delta(it.folder, name))
    assert list(model.list_deltas()) == ["tenant"]


@pytest.mark.parametrize(
    "repo",
    [
        *("", ".", "..", "/", "/etc", "/dev/zero", "~", "nobody/nothing", "a/b/c", "http://x/y"),
        *("a\nb", "a\0b", "\x1b[2J", "\ud800", "\\\\server\\share", "x" * 100_000),
    ],
    ids=lambda name: repr(name[:20]),
)
def test_repos_that_are_none(serving, repo):
    """Which repos a tenant may name is for the server to decide; whatever he names, one line."""
    _, model = serving
    before = logits(model, token_ids(1, 4))
    refusal(lambda: model.load_delta(repo, "attack"), "delta repo")
    assert torch.equal(logits(model, token_ids(1, 4)), before)
