"""Decoding with one delta against float64, by Triton's interpreter where there is no GPU.

Errors are relative to the largest output: x, h and levels are rounded to 2^-9 (bfloat16) and 2^-12
(float16), and the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels.decode_plan import Codes, DecodePlan, canonical
from deltamix_kernels.prepack import pack_u, pack_v, unpack_u, unpack_v
from kernel_cases import DEVICE, EVERY, TOLERANCES, inputs, packed_of, poisoned

__all__ = ["poisoned"]  # a fixture for every test here too
pytestmark = pytest.mark.untraced

# 12 ranks of one width: more than a tile of 8. The interpreter takes a second a program and width.
MIXED = ([8, 4] + [2] * 12, [8, 4] + [3] * 5 + [2] * 7)
GROUPS = {  # (m, v_bits, u_bits) of each matrix, n
    "every width": ([(20, EVERY, EVERY[::-1])], 136),
    "rank 1, odd": ([(9, [4], [2])], 65),
    "three": ([(17, *MIXED), (16, [3] * 5, [2] * 5), (8, [8], [8])], 264),
    "two, odd": ([(70, [2] * 9, [3] * 9), (17, [3], [2])], 70),
    "no rank": ([(16, [0], [0])], 24),
}


def plan_of(group, dtype, **tiles):
    matrices, n = GROUPS[group]
    made = [packed_of(m, n, v, u, 0, True) for m, v, u in matrices]
    plan = DecodePlan([packed for packed, _ in made], dtype)
    plan.tiles = {**plan.tiles, "fused_rows": 16, "8": {**plan.tiles["8"], **tiles}}
    return plan, [delta for _, delta in made]


def off(found, expected):
    return max(
        float((y.double() - e).abs().max() / e.abs().max())
        for y, e in zip(found, expected, strict=True)
    )


def check(plan, deltas, rows, biased=False, change=lambda tensor: tensor):
    """`plan.linear` of random rows, twice: against float64, and bit for bit."""
    dtype = plan.dtype
    x = change(inputs(rows, plan.n, dtype))
    weights = [inputs(d.shape[0], plan.n, dtype, 2) for d in deltas]
    biases = [inputs(1, d.shape[0], dtype, 3)[0] if biased else None for d in deltas]
    found = plan.linear(x, weights, biases)
    assert all(y.dtype == dtype for y in found)
    expected = [
        x.double() @ (w.double() + d.double()).T + (0 if b is None else b.double())
        for w, d, b in zip(weights, deltas, biases, strict=True)
    ]
    assert off(found, expected) <= TOLERANCES[dtype]
    return found, lambda: plan.linear(x, weights, biases)


@pytest.mark.parametrize(
    ("group", "rows", "dtype"),
    [
        ("every width", 1, torch.bfloat16),
        ("every width", 16, torch.float16),
        ("rank 1, odd", 1, torch.bfloat16),
        ("rank 1, odd", 37, torch.float16),
        ("three", 8, torch.bfloat16),
        ("three", 13, torch.float16),
        ("two, odd", 9, torch.bfloat16),
        ("two, odd", 64, torch.bfloat16),
        ("no rank", 3, torch.float16),
    ],
)
def test_linear_against_float64(group, rows, dtype):
    plan, deltas = plan_of(group, dtype)
    found, again = check(plan, deltas, rows, biased=rows % 2 == 1)
    if rows == 1:
        assert all(map(torch.equal, found, again()))  # bit for bit


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_width_by_itself(bits):
    packed, delta = packed_of(24, 40, [bits] * 3, [bits] * 3, 0, True)
    for dtype in dk.DECODE_DTYPES:
        plan = DecodePlan([packed], dtype)
        x, y = inputs(2, 40, dtype), [torch.full((2, 24), float("nan"), dtype=dtype, device=DEVICE)]
        plan.expand(plan.shrink(x), y, add=False)
        assert off(y, [x.double() @ delta.double().T]) <= TOLERANCES[dtype]


def test_other_tiles_and_strided_rows():
    tiles = {
        "fused": {"WARPS": 4, "UNROLL": 2, "COLUMNS": 2},
        "shrink": {"UNROLL": 1},
    }
    plan, deltas = plan_of("every width", torch.float16, **tiles)
    check(plan, deltas, 5, biased=True, change=lambda x: torch.stack([x, x], 2)[:, :, 0])


def test_a_bias_of_some_and_weights_that_are_not_contiguous():
    plan, deltas = plan_of("two, odd", torch.bfloat16)
    x = inputs(2, plan.n, torch.bfloat16)
    weights = [inputs(plan.n, d.shape[0], torch.bfloat16, 2).T for d in deltas]
    bias = inputs(1, deltas[0].shape[0], torch.bfloat16, 3)[0]
    found = plan.linear(x, weights, [bias, None])
    expected = [
        x.double() @ (w.double() + d.double()).T for w, d in zip(weights, deltas, strict=True)
    ]
    expected[0] += bias.double()
    assert off(found, expected) <= TOLERANCES[torch.bfloat16]


def test_what_can_be_decoded():
    gaussian, grouped, grid = (
        packed_of(32, 32, [2], [2], size, kind)[0]
        for size, kind in ((0, True), (16, True), (0, False))
    )
    assert dk.decodable(gaussian, torch.float16) and not dk.decodable(gaussian, torch.float32)
    assert not dk.decodable(grouped, torch.float16) and not dk.decodable(grid, torch.float16)


def test_two_sets_of_widths():
    """So that the layers of a model do not compile a variant each."""
    sets = [canonical(sum(1 << b for b in some)) for some in ([2], [2, 3, 8], [4], [5], [1, 8])]
    assert len(set(sets[:3])) == 1 and len(set(sets[3:])) == 1 and sets[0] != sets[3]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (130, 50), (256, 384)])
def test_prepacking_is_undone_exactly(m, n):
    bits = EVERY * 3
    packed, _ = packed_of(m, n, sorted(bits, reverse=True), bits, 0, True)
    v = pack_v(packed.v, packed.runs, n)
    assert v.shape[1] % 16 == 0
    assert torch.equal(unpack_v(v, packed.runs, n), packed.v)
    assert torch.equal(unpack_u(pack_u(packed.u, packed.runs), packed.runs, m), packed.u)
    codes = Codes.of([packed])
    assert sorted(codes.slots.tolist()) == list(range(codes.total))  # every slot is written
