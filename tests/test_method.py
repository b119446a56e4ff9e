"""The three methods, and every part of ours switched off on its own."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from tiny_pairs import fine_tune, logits, make_config, token_ids, weight_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from deltamix_hf import METHODS, DeltaMixConfig, DeltaMixError, Method
from deltamix_hf.method import SWITCHES

pytestmark = pytest.mark.untraced

PUBLISHED = {
    "whiten": False,
    "fisher": False,
    "delta_metric": 0.0,
    "prior": 0.0,
    "split_widths": False,
    "codebook": "min-max",
    "group_size": 128,
    "embedding_group_size": 0,
    "sequential": False,
    "unbiased_gains": False,
    "drop_penalty": 1.0,
    "tune_steps": 0,
    "bf16_overlay": False,
}
DELTA_COME = PUBLISHED | {"allocation": "bands", "bits": (0, 2, 3, 8), "correct_target": False}
DELTAMIX = PUBLISHED | {"allocation": "matrix", "bits": (0, 2, 3, 4, 8), "correct_target": True}
OURS = {
    "whiten": True,
    "fisher": True,
    "delta_metric": 0.3,
    "prior": 1.0,
    "allocation": "global",
    "split_widths": True,
    "bits": (0, 2, 3, 4, 8),
    "codebook": "gaussian",
    "group_size": 0,
    "embedding_group_size": 128,
    "correct_target": True,
    "sequential": True,
    "unbiased_gains": True,
    "drop_penalty": 4.0,
    "tune_steps": 40,
    "bf16_overlay": True,
}
IDS, BUDGET = token_ids() % 96, 14_000
EXPECTED = {"delta-come": DELTA_COME, "deltamix": DELTAMIX, "deltamix-kl": OURS}


def test_the_methods_are_as_published():
    assert {name: vars(method) for name, method in METHODS.items()} == {
        name: {"name": name, **switches} for name, switches in EXPECTED.items()
    }
    assert DeltaMixConfig("b").method is METHODS["deltamix-kl"]
    assert all(f"        {name}: " in Method.__doc__ for name in ("name", *SWITCHES))


def test_a_changed_method_keeps_its_name():
    changed = replace(METHODS["deltamix-kl"], bits=[8, 2, 2, 0])
    config = DeltaMixConfig("b", method=changed)
    assert config.method is changed and changed.bits == (0, 2, 8)
    assert config.to_dict()["method"] == "deltamix-kl"
    with pytest.raises(FrozenInstanceError):
        changed.fisher = False
    with pytest.raises(DeltaMixError, match="method is 'mine'"):
        DeltaMixConfig("b", method=Method(name="mine"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder with a base and a fine-tune of one layer, and the fine-tune's logits."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **size, **heads)).eval()
    model.save_pretrained(folder / "base")
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    return folder, logits(model, IDS)


def compress(folder, **options):
    config = make_config(folder / "base", budget_bytes=BUDGET, **options)
    return LlamaForCausalLM.from_pretrained(folder / "tuned", quantization_config=config)


OFF = {
    "nothing": {},
    "whiten": {"whiten": False},
    "fisher": {"fisher": False},
    "global": {"allocation": "matrix", "split_widths": False},
    "split_widths": {"split_widths": False},
    "gaussian": {"codebook": "min-max"},
    "one_scale": {"group_size": 32},
    "correct_target": {"correct_target": False},
    "sequential": {"sequential": False},
    "unbiased_gains": {"unbiased_gains": False},
    "drop_penalty": {"drop_penalty": 1.0},
    "tune_steps": {"tune_steps": 0},
    "bf16_overlay": {"bf16_overlay": False},
    "dropping": {"bits": (2, 3)},
}


@pytest.mark.parametrize("part", OFF)
def test_each_part_can_be_switched_off(pair, part, tmp_path):
    folder, wanted = pair
    options = {"calibration": token_ids(8, 16, seed=7) % 96, "tune_steps": 2} | OFF[part]
    model = compress(folder, **options)
    found = logits(model, IDS)
    model.save_pretrained(tmp_path)
    assert weight_bytes(tmp_path) <= BUDGET
    assert (found - wanted).norm() < 0.2 * wanted.norm()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), found)
    stored = again.config.quantization_config
    assert all(getattr(stored.method, name) == value for name, value in OFF[part].items())


@pytest.mark.parametrize("method", METHODS)
def test_without_calibration(pair, method, tmp_path):
    folder, wanted = pair
    model = compress(folder, method=method, tune_steps=0, num_samples=4)
    found = logits(model, IDS)
    model.save_pretrained(tmp_path)
    assert weight_bytes(tmp_path) <= BUDGET
    assert (found - wanted).norm() < 0.2 * wanted.norm()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), IDS), found)


def test_the_allocation_as_shipped(pair, tmp_path):
    """Other tests stop at its first program; here windows grow to the default gap."""
    folder, wanted = pair
    made = compress(folder, allocation_gap=None, tune_steps=0, num_samples=4)
    assert made.config.quantization_config.allocation_gap is None
    made.save_pretrained(tmp_path)
    assert weight_bytes(tmp_path) <= BUDGET
    assert (logits(made, IDS) - wanted).norm() < 0.2 * wanted.norm()
