"""Copies and pickles of models with deltas: they do as the original did, and share nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from many_deltas import loaded
from tiny_pairs import logits, token_ids

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import delta_modules


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
}


@pytest.fixture(scope="module", params=["llama_tied", "gpt2", "mixtral"])
def family(request, make_family):
    return make_family(request.param)


@pytest.mark.untraced
@pytest.mark.parametrize("way", WAYS)
def test_of_a_model_with_its_own_delta(family, way, tmp_path):
    model = family.pair.load(family.repos["one"])
    expected, dense = logits(model), family.pair.load(family.repos["one"]).dequantize()
    made = WAYS[way](model)
    assert torch.equal(logits(made), expected)
    table = made.get_input_embeddings().weight
    assert torch.equal(table, dense.get_input_embeddings().weight)
    if made.config.tie_word_embeddings:
        assert table is made.get_output_embeddings().weight
    made.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(family.pair.load(tmp_path / "again")), expected)
    made.dequantize()
    assert delta_modules(model) and torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(made), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_of_a_base_beside_its_deltas(family, way, tmp_path):
    model, ids = loaded(family), token_ids(3, 7)
    names = ["two", None, "three"]
    expected, alone = logits(model, ids, delta_names=names), logits(model, ids)
    made = WAYS[way](model)
    assert made.list_deltas() == model.list_deltas() and made.active_deltas == ["one"]
    assert torch.equal(logits(made, ids, delta_names=names), expected)
    made.set_delta("two")  # of the copy alone
    made.delete_delta("three")
    assert torch.equal(logits(model, ids), alone)
    assert torch.equal(logits(model, ids, delta_names=names), expected)
    model.set_delta(None)
    assert torch.equal(logits(made, ids), logits(model, ids, delta_names="two"))
    made.load_delta(family.repos["three"], "three")
    assert torch.equal(logits(made, ids, delta_names=names), expected)
    with pytest.raises(DeltaMixError, match=r"without \['two'\]"):
        made.base_model.save_pretrained(tmp_path / "part")


def test_a_layer_copied_by_itself_is_dense(family):
    model = family.pair.load(family.repos["one"])
    for module in delta_modules(model).values():
        made = copy.deepcopy(module)
        assert type(made) is module.dm_plain_class and torch.equal(made.weight, module.weight)
        assert made.weight.data_ptr() != module.weight.data_ptr()
    assert torch.equal(logits(model), logits(family.pair.load(family.repos["one"])))


def test_a_part_of_a_base_beside_its_deltas_is_not_copied(family):
    model = loaded(family)
    for part in (model.base_model, model.get_input_embeddings()):
        with pytest.raises(DeltaMixError, match=r"cannot be (changed or )?copied by itself"):
            copy.deepcopy(part)
