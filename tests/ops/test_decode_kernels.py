"""The decode kernels against float64, by Triton's interpreter where there is no GPU.

The errors are those of 16-bit operands (kernel_cases.py); outputs and workspaces begin as NaN.
"""

from __future__ import annotations

import pytest
import torch
from deltamix_kernels.decode_plan import DecodePlan, ExpandTiles, FusedTiles, ShrinkTiles
from deltamix_kernels.prepack import pack_u, pack_v, unpack_u, unpack_v
from kernel_cases import TOLERANCES, inputs, packed_of

pytestmark = pytest.mark.interpreter

EVERY = list(range(8, 0, -1))
# 17 ranks: more than two tiles of 8. The interpreter takes a second a few thousand weights.
MIXED = ([8, 4, 4, 3] + [2] * 13, [8, 8, 4, 4] + [3] * 6 + [2] * 7)
GROUPS = {  # (m, v_bits, u_bits) of each matrix, n
    "every width": ([(50, EVERY, EVERY[::-1])], 130),
    "rank 1": ([(33, [4], [2])], 65),
    "three": ([(72, *MIXED), (16, [3] * 5, [2] * 5), (8, [8], [8])], 384),
    "two, odd": ([(72, *MIXED), (40, [2] * 9, [3] * 9)], 264),
}
BFLOAT, HALF = torch.bfloat16, torch.float16
USUAL, SHARED = (ShrinkTiles(), ExpandTiles()), (ShrinkTiles(2, 1), ExpandTiles(2, 1))
# Not every pair of a group and of rows: each costs the interpreter 2 to 10 s.
CASES = [
    pytest.param("every width", 1, BFLOAT, USUAL, False, id="every width, 1 row"),
    pytest.param("every width", 16, HALF, USUAL, True, id="every width, 16 rows"),
    pytest.param("rank 1", 37, BFLOAT, SHARED, True, id="rank 1, 37 rows, shared"),
    pytest.param("three", 5, BFLOAT, SHARED, False, id="three, 5 rows, shared"),
    pytest.param("two, odd", 21, HALF, SHARED, True, id="two, 21 rows, shared"),
]
FUSED = [
    pytest.param("every width", 13, HALF, FusedTiles(2, 1, columns=2), id="every width, 13 rows"),
    pytest.param("rank 1", 1, BFLOAT, FusedTiles(), id="rank 1, 1 row"),
    pytest.param("three", 5, BFLOAT, FusedTiles(2, 1, columns=2), id="three, 5 rows"),
    pytest.param("two, odd", 9, HALF, FusedTiles(2, 2), id="two, 9 rows"),
]


def plan_of(matrices, n, dtype, *tiles):
    made = [packed_of(m, n, v, u, 0, True) for m, v, u in matrices]
    return DecodePlan([packed for packed, _ in made], dtype, *tiles), [delta for _, delta in made]


def off(found, expected):
    return max(
        float((y.double() - e).abs().max() / e.abs().max())
        for y, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("group", "rows", "dtype", "tiles", "add"), CASES)
def test_the_delta_is_added(group, rows, dtype, tiles, add):
    matrices, n = GROUPS[group]
    plan, deltas = plan_of(matrices, n, dtype, *tiles)
    x = inputs(rows, n, dtype)
    y = [inputs(rows, d.shape[0], dtype, seed=1) for d in deltas]
    expected = [
        x.double() @ d.double().T + add * b.double() for d, b in zip(deltas, y, strict=True)
    ]
    if not add:
        y = [torch.full_like(b, float("nan")) for b in y]
    plan.h[:, plan.slots.long()] = float("nan")
    plan.shrink(x)
    plan.expand(y, add=add)
    assert off(y, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("group", "rows", "dtype", "tiles"), FUSED)
def test_base_and_delta_in_one_launch(group, rows, dtype, tiles):
    check_fused(group, rows, dtype, tiles, delta=True)


def test_the_base_alone():
    check_fused("two, odd", 13, HALF, FusedTiles(), delta=False)


def check_fused(group, rows, dtype, tiles, delta):
    matrices, n = GROUPS[group]
    n = -(-n // 8) * 8
    plan, deltas = plan_of(matrices, n, dtype, *SHARED, tiles)
    x = inputs(rows, n, dtype)
    weights = [inputs(d.shape[0], n, dtype, seed=2) for d in deltas]
    y = [torch.full((rows, d.shape[0]), float("nan"), dtype=dtype) for d in deltas]
    plan.h[:, plan.slots.long()] = float("nan")
    if delta:  # else h is not read
        plan.shrink(x)
    plan.fused(x, weights, y, delta=delta)
    expected = [
        x.double() @ (w.double() + delta * d.double()).T
        for w, d in zip(weights, deltas, strict=True)
    ]
    assert off(y, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (130, 50), (256, 384)])
def test_prepacking_is_undone_exactly(m, n):
    bits = EVERY * 3
    packed, _ = packed_of(m, n, sorted(bits, reverse=True), bits, 0, True)
    v = pack_v(packed.v, packed.runs, n)
    assert v.shape[1] % 16 == 0
    assert torch.equal(unpack_v(v, packed.runs, n), packed.v)
    assert torch.equal(unpack_u(pack_u(packed.u, packed.runs), packed.runs, m), packed.u)
