"""Products by factors in memory: many rows, gradients, float32 and min-max grids."""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels import launch, layout
from kernel_cases import DEVICE, EVERY, TOLERANCES, error, inputs, packed_of, poisoned

__all__ = ["poisoned"]  # a fixture for every test here too
pytestmark = pytest.mark.untraced

ROWS = 67  # more than m·n / (m + n) of each layout
LAYOUTS = [  # m, n, v_bits, u_bits, group_size, gaussian
    pytest.param(71, 139, EVERY, EVERY[::-1], 0, True, id="every width"),
    pytest.param(130, 51, EVERY, EVERY, 32, False, id="min-max, groups of 32"),
    pytest.param(33, 65, [4], [2], 0, True, id="rank 1"),
    pytest.param(64, 128, [3] * 20 + [2] * 9, [2] * 20 + [4] * 9, 0, True, id="tiles of one run"),
    pytest.param(130, 90, [5, 2], [3, 6], 16, True, id="gaussian in groups of 16"),
    pytest.param(300, 50, [8, 3, 2], [2, 3, 2], (0, 128), True, id="groups of U alone"),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", [layout.values for layout in LAYOUTS], ids=lambda v: str(v[:2]))
def test_against_float64(layout, dtype):
    packed, delta = packed_of(*layout)
    m, n = layout[:2]
    factors = [dk.dequantize(packed, side, dtype) for side in (launch.V, launch.U)]
    assert [f.shape for f in factors] == [(packed.rank, n), (packed.rank, m)]
    assert all(f.stride(0) % 8 == 0 and f.dtype == dtype for f in factors)
    product = factors[1].double().T @ factors[0].double()
    assert error(product, delta) < TOLERANCES[dtype]
    weight, bias = inputs(m, n, dtype, 1), inputs(1, m, dtype, 2)[0]
    # two products more, or one with the sum of the matrices; few rows may be the decode kernels'
    for rows in (ROWS,) if dk.decodable(packed, dtype) else (3, ROWS):
        x = inputs(rows, n, dtype)
        expected = x.double() @ (weight.double() + delta).T + bias.double()
        found = dk.delta_linear(x, weight, bias, packed)
        assert found.dtype == dtype and error(found, expected) < TOLERANCES[dtype]
        assert error(dk.low_rank(x, packed), x.double() @ delta.T) < TOLERANCES[dtype]
    back = inputs(ROWS, m, dtype, 3)
    assert error(dk.low_rank(back, packed, True), back.double() @ delta) < TOLERANCES[dtype]


def test_in_chunks(monkeypatch):
    packed, delta = packed_of(40, 70, [3, 2], [2, 2], 0, True)
    x, weight = inputs(25, 70, torch.float32), inputs(40, 70, torch.float32, 1)
    monkeypatch.setattr(launch, "CHUNK", 10)
    expected = x.double() @ (weight.double() + delta).T
    assert error(dk.delta_linear(x, weight, None, packed), expected) < 2e-6
    assert error(dk.low_rank(x, packed), x.double() @ delta.T) < 2e-6


def test_autocast_changes_nothing():
    packed, _ = packed_of(40, 70, [3, 2], [2, 2], 0, True)
    x, weight = inputs(ROWS, 70, torch.float32), inputs(40, 70, torch.float32, 1)
    plain = dk.delta_linear(x, weight, None, packed), dk.low_rank(x, packed)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = dk.delta_linear(x, weight, None, packed), dk.low_rank(x, packed)
    assert all(map(torch.equal, plain, found))


def test_no_rank_is_kept():
    packed, _ = packed_of(24, 40, [0, 0], [0, 0], 0, True)
    x, weight = inputs(ROWS, 40, torch.float32), inputs(24, 40, torch.float32, 1)
    assert error(dk.delta_linear(x, weight, None, packed), x.double() @ weight.double().T) < 2e-6
    assert torch.equal(dk.low_rank(x, packed), torch.zeros(ROWS, 24, device=DEVICE))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Not on the current one, as Triton would."""
    current, seen = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class Elsewhere:
        is_cuda, device = True, torch.device("cuda", 1)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((current[-1], grid, args[1:], options))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    launch.launch(Kernel(), (3,), Elsewhere(), 5, M=16)
    assert seen == [(1, (3,), (5,), {"M": 16})] and current == [0]


def test_strided_input_and_no_rows():
    packed, delta = packed_of(40, 33, [3, 2], [2, 2], 0, True)
    wide = inputs(4, 66, torch.float32)
    for x in (wide[:, :33], wide[:, ::2], wide[::2, 33:]):
        assert error(dk.low_rank(x, packed), x.double() @ delta.T) < 2e-6
    weight = inputs(40, 33, torch.float32, 1)
    assert dk.delta_linear(x[:0], weight, None, packed).shape == (0, 40)


def test_supported_group_sizes():
    sizes = (0, 1, 8, 16, 24, 32, 48, 128)
    assert [g for g in sizes if dk.supported((0, g))] == [0, 16, 32, 48, 128]
    assert dk.supported((16, 0)) and not dk.supported((8, 0))
    assert launch.columns_at_once(16, 48) == 2 and launch.columns_at_once(16, 0) == 16


def test_a_table_lives_as_long_as_the_ranks():
    """A captured graph reads it."""
    packed, _ = packed_of(40, 70, [3, 2], [2, 2], 0, True)
    dk.dequantize(packed, launch.V, torch.float32)
    table = layout.tile_table(packed.runs, 16, packed.ranks)
    assert table is layout.tile_table(packed.runs, 16, packed.ranks)
    held = len(layout._tables)
    del packed
    assert len(layout._tables) == held - 1


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_a_captured_graph_runs_on_new_inputs(rows):
    packed, delta = packed_of(50, 136, [8, 3, 2], [4, 3, 2], 0, True)
    x, weight = inputs(rows, 136, torch.bfloat16), inputs(50, 136, torch.bfloat16, 1)
    plan = dk.DecodePlan([packed], torch.bfloat16)

    def run():
        if rows > dk.DECODE_ROWS:
            return dk.delta_linear(x, weight, None, packed)
        return plan.linear(x, [weight], [None])[0]

    run()  # compiles, and copies the tile table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(inputs(rows, 136, torch.bfloat16, 5))
    graph.replay()
    expected = x.double() @ (weight.double() + delta).T
    assert error(y, expected) < TOLERANCES[torch.bfloat16]
