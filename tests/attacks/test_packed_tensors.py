"""Packed tensors that are sound safetensors and yet nothing a compressor writes."""

from __future__ import annotations

import pytest
import torch
from hostile import MODULE, edit_json, edit_settings, edit_weights

pytestmark = pytest.mark.untraced

BOTH = pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
RANKS = f"{MODULE}.dm_ranks"


def bits(value: float) -> int:
    """The int16 that stands for the bfloat16 nearest to `value`."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))


@BOTH
@pytest.mark.parametrize("place", [(0, 1), (-1, -1)])
@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 3e38, 2.0**32]
)
def test_scales(attack, method, place, scale):
    it = attack("llama", method)
    edit_weights(it.folder, lambda tensors: tensors[RANKS][place].fill_(bits(scale)))
    it.refused(MODULE, "a scale is negative, NaN, infinite or above 2^32")


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1e-38, 2.0**31])
def test_odd_scales_that_are_numbers(attack, method, scale):
    it = attack("llama", method)
    edit_weights(it.folder, lambda tensors: tensors[RANKS][:, 1:].fill_(bits(scale)))
    module = it.load().get_submodule(MODULE)
    assert torch.isfinite(module.packed().dense()).all()


@BOTH
@pytest.mark.parametrize("width", [0, 9, 15, 9 * 16 + 1, 1, 16, -1, -(2**15), 2**15 - 1])
def test_widths(attack, method, width):
    it = attack("llama", method)
    edit_weights(it.folder, lambda tensors: tensors[RANKS][-1, 0].fill_(width))
    it.refused(MODULE)


@BOTH
@pytest.mark.parametrize("exponent", [1, 3, 16, 64, 127])
def test_group_sizes_of_u(attack, method, exponent):
    it = attack("llama", method)

    def change(tensors):
        tensors[RANKS][:, 0] = tensors[RANKS][:, 0] % 256 + 256 * exponent

    edit_weights(it.folder, change)
    it.refused(MODULE)


@BOTH
@pytest.mark.parametrize(
    "size", [0, 1, 7, 63, 2**29, 2**30 + 1, 2**62, 2**63, 10**400, -1, 0.5, "128", True, [128]]
)
def test_group_sizes(attack, method, size):
    it = attack("llama", method)
    edit_settings(it.folder, group_size=size)
    if method == "deltamix-kl" and size in (0, 2**29):  # one group for a vector, as it was
        it.load()
    else:
        it.refused()


@BOTH
@pytest.mark.parametrize("times", [2, 9])
def test_more_ranks_than_there_can_be(attack, method, times):
    """All sound by themselves: [64, 64] has no 65th rank."""
    it = attack("llama", method)

    def change(tensors):
        parts = [name for name in tensors if name.startswith(f"{MODULE}.dm_")]
        rows = 40 * times // len(tensors[RANKS]) + 1
        order = torch.arange(len(tensors[RANKS])).repeat_interleave(rows)
        widths = tensors[RANKS][:, 0].tolist()
        for name in parts:
            sizes = {
                "dm_v": [w % 16 for w in widths],
                "dm_u": [w // 16 % 16 for w in widths],
                "dm_ranks": [1] * len(widths),
                "dm_zeros": [max(w % 16, w // 16 % 16) for w in widths],
            }[name.rpartition(".")[2]]
            blocks = tensors[name].split(sizes)
            tensors[name] = torch.cat([blocks[i] for i in order.tolist()])

    edit_weights(it.folder, change)
    it.refused(MODULE, "ranks", "at most 64")


@BOTH
def test_no_rank_at_all(attack, method):
    """Nothing is wrong with that: the matrix is the base's."""
    it = attack("llama", method)

    def change(tensors):
        for name in [name for name in tensors if name.startswith(f"{MODULE}.dm_")]:
            tensors[name] = tensors[name][:0].clone()

    edit_weights(it.folder, change)
    module = it.load().get_submodule(MODULE)
    assert not module.packed().dense().any()
    assert torch.isfinite(module(torch.ones(1, 3, 64))).all()


def test_zero_points_that_are_no_codes(attack):
    """Where U has fewer bits than V, its zero points have room for values it has no codes for."""
    it = attack("llama", "delta-come")

    def change(tensors):
        ranks, zeros = tensors[RANKS], tensors[f"{MODULE}.dm_zeros"]
        width = int(ranks[0, 0]) % 16
        row = int(ranks[0, 0]) // 16 % 16
        assert width == row == 8
        ranks[0, 0] = 8 + 16 * 1
        u = tensors[f"{MODULE}.dm_u"]
        tensors[f"{MODULE}.dm_u"] = torch.cat([u[:1], u[8:]])
        zeros[:8] = 255

    edit_weights(it.folder, change)
    it.refused(MODULE, "zero point")


@BOTH
@pytest.mark.parametrize("part", ["dm_v", "dm_u", "dm_ranks"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.float16, torch.float32, torch.int32, torch.float64]
)
def test_dtypes(attack, method, part, dtype):
    it = attack("llama", method)
    name = f"{MODULE}.{part}"
    edit_weights(it.folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    it.refused(MODULE)


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t[:, :-1],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t[:, :1]], 1),
        lambda t: t[None],
        lambda t: t.flatten(),
        lambda t: t[:0],
        lambda t: t[:, :0],
        lambda t: t[0, 0],
    ],
    ids=["row less", "column less", "rows", "column", "3d", "1d", "no rows", "no columns", "0d"],
)
@pytest.mark.parametrize("part", ["dm_v", "dm_u", "dm_ranks"])
def test_shapes(attack, method, part, change):
    it = attack("llama", method)
    name = f"{MODULE}.{part}"
    edit_weights(it.folder, lambda t: t.update({name: change(t[name]).contiguous().clone()}))
    it.refused(MODULE)


@pytest.mark.parametrize("codebook", ["surprise", "", None, 5, ["gaussian"], "Gaussian"])
def test_codebooks(attack, codebook):
    it = attack("llama", "deltamix-kl")
    edit_json(
        it.folder / "config.json", lambda c: c["quantization_config"].update(codebook=codebook)
    )
    if codebook is None:  # the method's own
        it.load()
    else:
        it.refused("codebook")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_whole_tensors_that_are_not_numbers(attack, name, value):
    it = attack()
    edit_weights(it.folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    it.refused(name, "NaN or infinity")
