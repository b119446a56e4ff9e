"""Small files that say much: memory and time follow the bytes of the files, not what they claim."""

from __future__ import annotations

import time

import pytest
import torch
from hostile import (
    MODULE,
    WEIGHTS,
    edit_header,
    edit_json,
    edit_settings,
    edit_weights,
    read_raw,
    refusal,
)
from limits import little_room

from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.errors import DeltaMixError
from deltamix_hf.quantization.packed_layout import layout_of


def problem(folder) -> str:
    return next(c.problem for c in verify_repo(str(folder)) if c.problem)


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("llama", {"num_labels": 3_000_000}),
        ("llama", {"num_hidden_layers": 20_000_000}),
        ("llama", {"num_hidden_layers": 1e9}),
        ("qwen3", {"num_hidden_layers": 20_000_000, "layer_types": None}),
        ("t5", {"num_decoder_layers": 10_000_000}),
        ("gpt2", {"n_layer": 10_000_000}),
        ("mixtral", {"num_local_experts": 10_000_000}),
        ("llama", {"text_config": {"num_hidden_layers": 20_000_000}}),
        ("llama", {"depths": [2, 20_000_000]}),
        ("llama", {"attention_types": [[["global"], 100_000_000]]}),
        ("llama", {"num_feedforward_networks": 10_000_000}),
        ("mixtral", {"num_hidden_layers": 900, "num_local_experts": 900}),
    ],
)
def test_counts_in_config_json(attack, family, counts):
    it = attack(family)
    edit_json(it.folder / "config.json", lambda config: config.update(counts))
    began = time.monotonic()
    for read in (it.serve, lambda: inspect_repo(it.folder)):
        refusal(read, "says", "its base has")
    with little_room(1 << 30):
        assert "and its base has" in problem(it.folder)
    assert time.monotonic() - began < 20


def test_as_many_layers_as_the_base_has_tensors_may_be_said(attack):
    """And more than a thousand only with a fingerprint for each: the file grows with them."""
    it = attack("llama")
    many = {f"model.layers.{i}.x": "0" * 32 for i in range(3000)}
    edit_settings(it.folder, base_fingerprints=many)
    edit_json(it.folder / "config.json", lambda c: c.update(num_hidden_layers=3001))
    refusal(it.serve, "says num_hidden_layers = 3001")
    edit_json(it.folder / "config.json", lambda c: c.update(num_hidden_layers=2999))
    assert "says" not in refusal(it.serve)


def test_ranks_are_counted_before_they_are_looked_at(attack):
    it = attack("llama", "deltamix-kl")
    edit_weights(it.folder, lambda t: t.update({f"{MODULE}.dm_ranks": more_ranks(t)}))
    it.refused("the delta has 8000000 ranks")
    assert "the delta has 8000000 ranks" in problem(it.folder)


def more_ranks(tensors: dict) -> torch.Tensor:
    ranks = tensors[f"{MODULE}.dm_ranks"]
    return ranks[:1].expand(8_000_000, -1).contiguous()


def test_widths_of_many_ranks_take_no_more_than_their_bytes():
    """As lists of numbers they took 45 times as much."""
    ranks = torch.full((8_000_000, 1), 0x22, dtype=torch.int16)
    with little_room(200_000_000):
        assert layout_of(ranks, 0) == ([(8_000_000, 2, 2)], (0, 0))


@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_very_many_empty_tensors(attack, kind):
    it, count = attack("llama"), 100_000
    header, data = read_raw(it.folder / WEIGHTS)
    name = "model.layers.{}.x.weight" if kind == "whole" else "model.layers.{}.x.dm_v"
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
    more = {name.format(i): empty for i in range(count)}
    edit_header(it.folder / WEIGHTS, lambda h: h.update(more))
    began, size = time.monotonic(), (it.folder / WEIGHTS).stat().st_size
    refusal(it.serve, f"holds {len(header) - 1 + count} tensors, for a model of 21")
    refusal(it.load, f"holds {len(header) - 1 + count} tensors, for a model of 21")
    assert "tensors, for a model of 21" in problem(it.folder)
    assert time.monotonic() - began < 3 * 2e-6 * size + 10  # 0.2 s a MB on an EPYC core


def test_a_nested_config_that_is_no_object(attack):
    it = attack("llama")
    edit_json(it.folder / "config.json", lambda c: c.update(num_labels=[3, "x", {}, 2**70]))
    with pytest.raises(DeltaMixError, match="says num_labels"):
        inspect_repo(it.folder)
