"""The decode kernels against float64, by Triton's interpreter where there is no GPU.

The errors are those of 16-bit operands (kernel_cases.py); outputs and workspaces begin as NaN.
"""

from __future__ import annotations

import pytest
import torch
from deltamix_kernels.decode_plan import DecodePlan, ExpandTiles, ShrinkTiles
from deltamix_kernels.prepack import pack_u, pack_v, unpack_u, unpack_v
from kernel_cases import TOLERANCES, inputs, packed_of

pytestmark = pytest.mark.interpreter

EVERY = list(range(8, 0, -1))
MIXED = ([8, 4, 4, 3] + [2] * 40, [8, 8, 4, 4] + [3] * 20 + [2] * 20)
GROUPS = [  # (m, v_bits, u_bits) of each matrix, n
    pytest.param([(50, EVERY, EVERY[::-1])], 130, id="every width"),
    pytest.param([(33, [4], [2])], 65, id="rank 1"),
    pytest.param([(256, *MIXED), (64, [3] * 5, [2] * 5), (64, [8], [8])], 512, id="three"),
    pytest.param([(264, *MIXED), (136, [2] * 9, [3] * 9)], 264, id="two, odd"),
]
TILES = [
    pytest.param(ShrinkTiles(), ExpandTiles(), id="default"),
    pytest.param(
        ShrinkTiles(R=16, C=16, S=1, splits=2),
        ExpandTiles(R=16, C=16, S=1, programs=999),
        id="split",
    ),
]


def plan_of(matrices, n, dtype, *tiles):
    made = [packed_of(m, n, v, u, 0, True) for m, v, u in matrices]
    return DecodePlan([packed for packed, _ in made], dtype, *tiles), [delta for _, delta in made]


def poison(plan):
    """NaN wherever a kernel must write."""
    plan.h[:, plan.slots.long()] = float("nan")
    for parts in plan._parts.values():
        for part in parts:
            part.fill_(float("nan"))


@pytest.mark.parametrize(("shrink", "expand"), TILES)
@pytest.mark.parametrize(("matrices", "n"), GROUPS)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (16, torch.float16), (37, torch.bfloat16)]
)
def test_the_delta_is_added(matrices, n, shrink, expand, rows, dtype):
    plan, deltas = plan_of(matrices, n, dtype, shrink, expand)
    x = inputs(rows, n, dtype)
    plan._workspace(plan._rows_at_once(rows), -(-rows // plan._rows_at_once(rows)))
    for add in (False, True):
        y = [inputs(rows, d.shape[0], dtype, seed=1) for d in deltas]
        expected = [
            x.double() @ d.double().T + add * b.double() for d, b in zip(deltas, y, strict=True)
        ]
        if not add:
            y = [torch.full_like(b, float("nan")) for b in y]
        poison(plan)
        plan.shrink(x)
        plan.expand(y, add=add)
        for got, wanted in zip(y, expected, strict=True):
            off = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert off <= TOLERANCES[dtype]
    assert not plan.arrived.any()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (130, 50), (256, 384)])
def test_prepacking_is_undone_exactly(m, n):
    bits = EVERY * 3
    packed, _ = packed_of(m, n, sorted(bits, reverse=True), bits, 0, True)
    v = pack_v(packed.v, packed.runs, n)
    assert v.shape[1] % 16 == 0
    assert torch.equal(unpack_v(v, packed.runs, n), packed.v)
    assert torch.equal(unpack_u(pack_u(packed.u, packed.runs), packed.runs, m), packed.u)
