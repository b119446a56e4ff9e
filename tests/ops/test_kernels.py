"""The Triton kernels against float64, by Triton's interpreter where there is no GPU.

Errors are relative to the largest output. float32: sums of up to a few thousand products, in
another order than the reference's. bfloat16 and float16: x, h and the levels are rounded to 2^-9
and 2^-12, and the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels import launch
from kernel_cases import DEVICE, EVERY, TOLERANCES, error, inputs, named, packed_of, pairs

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.interpreter

LONG = 4097 if DEVICE.type == "cuda" else 1027  # several steps of every loop and program
ROWS = {torch.float32: (5,), torch.bfloat16: (1, 64), torch.float16: (5,)}
LAYOUTS = [  # m, n, v_bits, u_bits, group_size, gaussian
    (50, 130, EVERY, EVERY[::-1], 0, True),
    (130, 50, [8, 3, 3, 2], [8, 3, 3, 2], 32, False),
    (33, 65, [4], [2], 0, True),
    (64, 64, [3] * 40 + [2] * 9, [2] * 40 + [4] * 9, 0, True),  # tiles of one run
    (17, 300, EVERY, EVERY, 128, False),
    (130, 90, [5, 2], [3, 6], 16, True),
    (300, 50, [8, 3, 2], [2, 3, 2], (0, 128), True),  # groups of U alone
]


@pytest.mark.parametrize("layout, dtype", pairs(LAYOUTS, list(TOLERANCES)), ids=named)
def test_linear_against_float64(layout, dtype):
    packed, delta = packed_of(*layout)
    m, n = layout[:2]
    weight, bias = inputs(m, n, dtype, 1), inputs(1, m, dtype, 2)[0]
    for rows in ROWS[dtype]:
        x = inputs(rows, n, dtype)
        expected = x.double() @ (weight.double() + delta).T
        assert error(dk.delta_linear(x, weight, None, packed), expected) < TOLERANCES[dtype]
        found = dk.delta_linear(x, weight, bias, packed)
        assert found.dtype == dtype and found.shape == (rows, m)
        assert error(found, expected + bias.double()) < TOLERANCES[dtype]
        assert torch.equal(found, dk.delta_linear(x, weight, bias, packed))  # bit for bit


@pytest.mark.parametrize("m, n", [(LONG, 50), (50, LONG)])
def test_long_sides(m, n):
    packed, delta = packed_of(m, n, [3, 2], [4, 2], 0, True)
    for rows, dtype in ((1, torch.float32), (64, torch.bfloat16)):
        x, weight = inputs(rows, n, dtype), inputs(m, n, dtype, 1)
        bias = inputs(1, m, dtype, 2)[0]
        expected = x.double() @ (weight.double() + delta).T + bias.double()
        found = dk.delta_linear(x, weight, bias, packed)
        assert error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_delta_alone_both_ways(layout, transposed):
    packed, delta = packed_of(*layout)
    x = inputs(3, layout[0 if transposed else 1], torch.float32).view(3, 1, -1)
    expected = x.double() @ (delta if transposed else delta.T)
    found = dk.low_rank(x, packed, transposed)
    assert found.shape == expected.shape and error(found, expected) < TOLERANCES[torch.float32]


def test_many_rows_add_to_the_vendor_product():
    packed, delta = packed_of(40, 70, [3, 2], [2, 2], 0, True)
    x, weight = inputs(70, 70, torch.float32), inputs(40, 70, torch.float32, 1)
    expected = x.double() @ (weight.double() + delta).T
    assert error(dk.delta_linear(x, weight, None, packed), expected) < 2e-6


def test_matrices_of_one_input_share_a_launch(monkeypatch):
    shapes = [(40, [8, 3]), (24, [2] * 20), (24, [4, 1])]
    made = [packed_of(m, 90, bits, bits, 0, True) for m, bits in shapes]
    group, x = [packed for packed, _ in made], inputs(2, 90, torch.float32)
    h = dk.shrink(x, group)
    first = 0
    for packed, delta in made:
        y = dk.expand(h, packed, torch.float32, first=first)
        assert error(y, x.double() @ delta.T) < 2e-6
        first += packed.rank
    with pytest.raises(ValueError, match="at most three"):
        dk.shrink(x, [*group, group[0]])
    other, _ = packed_of(8, 70, [2], [2], 0, True)
    with pytest.raises(ValueError, match="one input"):
        dk.shrink(x, [group[0], other])


def test_nothing_kept_and_no_rows():
    packed, _ = packed_of(24, 40, [0, 0], [0, 0], 0, True)
    x, weight = inputs(2, 40, torch.float32), inputs(24, 40, torch.float32, 1)
    assert packed.rank == 0
    assert error(dk.delta_linear(x, weight, None, packed), x.double() @ weight.double().T) < 2e-6
    assert torch.equal(dk.low_rank(x, packed), torch.zeros(2, 24, device=DEVICE))
    some, _ = packed_of(24, 40, [2], [2], 0, True)
    assert dk.delta_linear(x[:0], weight, None, some).shape == (0, 24)


def test_strided_input():
    packed, delta = packed_of(40, 33, [3, 2], [2, 2], 0, True)
    wide = inputs(4, 66, torch.float32)
    for x in (wide[:, :33], wide[:, ::2], wide[::2, 33:]):
        assert error(dk.low_rank(x, packed), x.double() @ delta.T) < 2e-6
        assert torch.equal(dk.shrink(x, [packed]), dk.shrink(x.contiguous(), [packed]))


def test_supported_group_sizes():
    sizes = (0, 1, 8, 16, 24, 32, 48, 128)
    assert [g for g in sizes if dk.supported((0, g))] == [0, 16, 32, 48, 128]
    assert dk.supported((16, 0)) and not dk.supported((8, 0))
    assert launch.columns_at_once(16, 48) == 2 and launch.columns_at_once(16, 0) == 16


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_a_captured_graph_runs_on_new_inputs(rows):
    packed, delta = packed_of(50, 130, [8, 3, 2], [4, 3, 2], 0, True)
    x, weight = inputs(rows, 130, torch.bfloat16), inputs(50, 130, torch.bfloat16, 1)
    dk.delta_linear(x, weight, None, packed)  # compiles, and copies the tile table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dk.delta_linear(x, weight, None, packed)
    x.copy_(inputs(rows, 130, torch.bfloat16, 5))
    graph.replay()
    expected = x.double() @ (weight.double() + delta).T
    assert error(y, expected) < TOLERANCES[torch.bfloat16]
