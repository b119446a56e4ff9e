"""Tensors that are missing, too many, in the wrong place or there twice."""

from __future__ import annotations

import pytest
import torch
from hostile import MODULE, edit_json, edit_settings, edit_weights

NORM = "model.norm.weight"


def packed_of(tensors, module: str) -> list[str]:
    return [name for name in tensors if name.startswith(f"{module}.dm_")]


@pytest.mark.parametrize("name", [NORM, "model.layers.0.input_layernorm.weight"])
def test_missing_whole_tensor(attack, name):
    """The base's own would answer instead, a little wrong and unnoticed."""
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.pop(name))
    it.refused(name, "incomplete")


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_missing_matrix(attack, method):
    it = attack("llama", method)

    def drop(tensors):
        for name in packed_of(tensors, MODULE):
            del tensors[name]

    edit_weights(it.folder, drop)
    it.refused(MODULE, "incomplete")


@pytest.mark.parametrize("name", ["x", "model.layers.9.input_layernorm.weight", "model.norm", "\0"])
@pytest.mark.parametrize("listed", [True, False])
def test_tensor_the_model_has_not(attack, name, listed):
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    if not listed:
        edit_settings(it.folder, overlay=None)
    it.refused()


@pytest.mark.parametrize(
    "to",
    ["model.layers.9.self_attn.o_proj", "model", "", "model.norm", "x.y", "model.embed_tokens.x"],
)
@pytest.mark.parametrize("listed", [True, False])
def test_matrix_of_a_module_that_is_none(attack, to, listed):
    it = attack()

    def rename(tensors):
        for name in packed_of(tensors, MODULE):
            tensors[name.replace(MODULE, to)] = tensors.pop(name)

    edit_weights(it.folder, rename)
    if not listed:
        edit_settings(it.folder, errors={})
    it.refused()


def test_a_weight_packed_and_whole(attack):
    it = attack()
    edit_weights(
        it.folder, lambda tensors: tensors.update({f"{MODULE}.weight": torch.ones(64, 64)})
    )
    edit_settings(it.folder, overlay=None)
    it.refused(MODULE, "for one weight")


def test_a_weight_under_two_names(attack):
    """transformers takes the name with and without its prefix for the same tensor."""
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    edit_settings(it.folder, overlay=None)
    it.refused("for one weight")


@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_a_tied_weight(attack, kind):
    """Embeddings and head are one tensor; the head's own would be used in one place alone."""
    it = attack("llama_tied", "delta-come")

    def change(tensors):
        if kind == "whole":
            tensors["lm_head.weight"] = torch.ones(256, 64)
            return
        for name in packed_of(tensors, "model.embed_tokens"):
            tensors[name.replace("model.embed_tokens", "lm_head")] = tensors[name].clone()

    edit_weights(it.folder, change)
    edit_settings(it.folder, overlay=None, errors={})
    it.refused("lm_head", "ties")


@pytest.mark.parametrize("tied", [True, False])
def test_ties_by_config(attack, tied):
    """`tie_word_embeddings` of config.json decides what is one tensor."""
    it = attack("llama" if tied else "llama_tied", "delta-come")
    edit_json(it.folder / "config.json", lambda c: c.update(tie_word_embeddings=tied))
    with pytest.raises(ValueError, match="lm_head"):
        it.load()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(63),
        torch.ones(64, 1),
        torch.ones(0),
        torch.ones(()),
        torch.ones(64, dtype=torch.int64),
        torch.ones(64, dtype=torch.bool),
        torch.ones(64, dtype=torch.uint16),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_whole_tensor_of_another_kind(attack, tensor):
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.update({NORM: tensor}))
    it.refused(NORM)


def test_guards_are_guards(attack):
    """A colon makes readers ignore a tensor: only for what is too small to hide anything."""
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors.update({"model:x": torch.ones(64)}))
    it.refused("model:x", "no guard")
