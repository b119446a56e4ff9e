"""`save_pretrained` of a part, and beside deltas: what comes back is what ran, or it is refused."""

from __future__ import annotations

import pytest
import torch
from many_deltas import loaded
from peft import LoraConfig
from tiny_pairs import logits, token_ids

from deltamix_hf import DeltaMixError


@pytest.fixture(scope="module", params=["llama_tied", "t5"])
def family(request, make_family):
    return make_family(request.param)


def inner(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def test_of_a_model_with_its_own_delta(family, tmp_path):
    model, ids = family.pair.load(family.repos["one"]), token_ids(2, 7)
    with pytest.raises(DeltaMixError, match="cannot be saved by itself"):
        inner(model).save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    expected, dense = logits(model, ids), model.dequantize()
    inner(dense).save_pretrained(tmp_path / "part")
    part = type(inner(dense)).from_pretrained(tmp_path / "part")
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, inner(dense).state_dict()[name])
    torch.testing.assert_close(logits(dense, ids), expected, rtol=1e-3, atol=1e-4)


def test_of_a_base_beside_its_deltas(family, tmp_path):
    model, ids = loaded(family), token_ids(2, 7)
    for saved in (model, inner(model)):
        with pytest.raises(DeltaMixError, match=r"without \['one'\]: call set_delta\(None\) first"):
            saved.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with model.disable_deltas():
        model.save_pretrained(tmp_path / "base")
        inner(model).save_pretrained(tmp_path / "part")
    found = family.pair.load(tmp_path / "base")
    assert torch.equal(logits(found, ids), family.alone(None, ids))


def test_an_adapter_beside_an_active_delta_is_saved_alone(family, tmp_path):
    model = loaded(family)
    model.add_adapter(
        LoraConfig(target_modules=["q" if model.config.is_encoder_decoder else "q_proj"])
    )
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*")) and (tmp_path / "adapter_model.safetensors").exists()
