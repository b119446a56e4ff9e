"""Packed experts that are sound safetensors and yet nothing a compressor writes."""

from __future__ import annotations

import pytest
import torch
from hostile import WEIGHTS, edit_header, edit_json, edit_weights

FUSED = "model.layers.0.mlp.experts.gate_up_proj"
COUNTS, RANKS = f"{FUSED}_dm_counts", f"{FUSED}_dm_ranks"
BOTH = pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])


@pytest.mark.untraced
@BOTH
@pytest.mark.parametrize(
    "counts",
    [
        [2**31 - 1, 2**31 - 1, 1, 1],
        [-1, 1, 0, 0],
        [0, 0, 0, 0],
        [-(2**31), 2**31 - 1, 1, 0],
        [65, 0, 0, 0],
    ],
)
def test_counts(attack, method, counts):
    it = attack("mixtral", method)
    edit_weights(it.folder, lambda tensors: tensors[COUNTS].copy_(torch.tensor(counts)))
    it.refused(FUSED, "counts do not fit")


@BOTH
def test_ranks_of_one_expert_given_to_another(attack, method):
    """All sums are right; the widths, sorted within each expert, tell."""
    it = attack("mixtral", method)

    def change(tensors):
        tensors[COUNTS][0] -= 1
        tensors[COUNTS][1] += 1

    edit_weights(it.folder, change)
    it.refused(FUSED, "not sorted")


@BOTH
def test_an_expert_that_is_not_listed(attack, method):
    it = attack("mixtral", method)
    edit_json(
        it.folder / "config.json",
        lambda config: config["quantization_config"]["errors"].pop(f"{FUSED}.2") and None,
    )
    it.refused(f"{FUSED}.2", "weights and config.json do not fit")


@BOTH
@pytest.mark.parametrize("number", ["4", "-1", "x", "00", "1.5"])
def test_a_listed_expert_that_is_not_there(attack, method, number):
    it = attack("mixtral", method)

    def change(config):
        config["quantization_config"]["errors"][f"{FUSED}.{number}"] = 0.1

    edit_json(it.folder / "config.json", change)
    it.refused(f"{FUSED}.{number}")


@BOTH
@pytest.mark.parametrize("part", ["v", "u", "ranks", "counts"])
def test_a_part_is_missing(attack, method, part):
    it = attack("mixtral", method)
    edit_weights(it.folder, lambda tensors: tensors.pop(f"{FUSED}_dm_{part}"))
    it.refused(f"{FUSED}_dm_{part}", "incomplete")


@BOTH
@pytest.mark.parametrize("part", ["v", "u", "ranks", "counts"])
def test_parts_of_other_shapes(attack, method, part):
    it = attack("mixtral", method)
    name = f"{FUSED}_dm_{part}"
    edit_weights(it.folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    it.refused(FUSED)


@BOTH
@pytest.mark.parametrize("part", ["v", "u", "counts"])
def test_parts_of_no_dimension(attack, method, part):
    it = attack("mixtral", method)
    name = f"{FUSED}_dm_{part}"
    edit_weights(it.folder, lambda tensors: tensors.update({name: tensors[name].flatten()[0]}))
    it.refused(FUSED)


@BOTH
@pytest.mark.parametrize("shape", [[2**40, 8], [0, 2**60], [2**20, 2**20]])
def test_codes_that_claim_much_memory(attack, method, shape):
    it = attack("mixtral", method)

    def change(header):
        header[f"{FUSED}_dm_v"]["shape"] = shape

    edit_header(it.folder / WEIGHTS, change)
    it.refused()


@BOTH
@pytest.mark.parametrize("scale", [float("nan"), -1.0, 3e38])
def test_scales_of_the_last_expert(attack, method, scale):
    it = attack("mixtral", method)
    pattern = int(torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16))
    edit_weights(it.folder, lambda tensors: tensors[RANKS][-1, -1].fill_(pattern))
    it.refused(FUSED, "a scale is negative, NaN, infinite or above 2^32")


@BOTH
@pytest.mark.parametrize("owner", ["model.layers.0.mlp.experts.act_fn", "model.norm", "nowhere"])
def test_packed_experts_of_what_has_none(attack, method, owner):
    it = attack("mixtral", method)

    def rename(tensors):
        for name in [name for name in tensors if name.startswith(f"{FUSED}_dm_")]:
            tensors[f"{owner}.weight_{name.rpartition('_proj_')[2]}"] = tensors.pop(name)

    def relist(config):
        errors = config["quantization_config"]["errors"]
        for name in [name for name in errors if name.startswith(f"{FUSED}.")]:
            errors[f"{owner}.weight.{name[-1]}"] = errors.pop(name)

    edit_weights(it.folder, rename)
    edit_json(it.folder / "config.json", relist)
    it.refused(owner)


@BOTH
def test_packed_and_whole(attack, method):
    it = attack("mixtral", method)
    edit_weights(it.folder, lambda tensors: tensors.update({FUSED: torch.zeros(4, 256, 64)}))
    it.refused(FUSED)
