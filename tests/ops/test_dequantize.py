"""Many rows of one delta: factors in memory, then products of torch."""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels import launch
from kernel_cases import (
    DEVICE,
    EVERY,
    TOLERANCES,
    error,
    inputs,
    named,
    packed_of,
    pairs,
    poisoned,
)

__all__ = ["poisoned"]  # a fixture for every test here too
pytestmark = pytest.mark.interpreter

ROWS = dk.DECODE_ROWS + 3
LAYOUTS = [  # m, n, v_bits, u_bits, group_size, gaussian
    (71, 139, EVERY, EVERY[::-1], 0, True),
    (130, 51, EVERY, EVERY, 32, False),
    (33, 65, [4], [2], 0, True),
    (64, 128, [3] * 20 + [2] * 9, [2] * 20 + [4] * 9, 0, True),  # tiles of one run
    (300, 50, [8, 3, 2], [2, 3, 2], (0, 128), True),  # groups of U alone
]


@pytest.mark.parametrize("layout, dtype", pairs(LAYOUTS, list(TOLERANCES)), ids=named)
def test_against_float64(layout, dtype):
    packed, delta = packed_of(*layout)
    m, n = layout[:2]
    factors = [dk.dequantize(packed, side, dtype) for side in (launch.V, launch.U)]
    assert [f.shape for f in factors] == [(packed.rank, n), (packed.rank, m)]
    assert all(f.stride(0) % 8 == 0 and f.dtype == dtype for f in factors)
    product = factors[1].double().T @ factors[0].double()
    assert error(product, delta) < TOLERANCES[dtype]
    x, weight = inputs(ROWS, n, dtype), inputs(m, n, dtype, 1)
    bias = inputs(1, m, dtype, 2)[0]
    expected = x.double() @ (weight.double() + delta).T + bias.double()
    found = dk.delta_linear(x, weight, bias, packed)
    assert found.dtype == dtype and error(found, expected) < TOLERANCES[dtype]
    assert error(dk.low_rank(x, packed), x.double() @ delta.T) < TOLERANCES[dtype]
    back = inputs(ROWS, m, dtype, 3)
    assert error(dk.low_rank(back, packed, True), back.double() @ delta) < TOLERANCES[dtype]


def test_in_chunks(monkeypatch):
    packed, delta = packed_of(40, 70, [3, 2], [2, 2], 0, True)
    x, weight = inputs(ROWS, 70, torch.float32), inputs(40, 70, torch.float32, 1)
    monkeypatch.setattr(launch, "CHUNK", 30)
    expected = x.double() @ (weight.double() + delta).T
    assert error(dk.delta_linear(x, weight, None, packed), expected) < 2e-6
    assert error(dk.low_rank(x, packed), x.double() @ delta.T) < 2e-6


def test_matrices_of_one_input():
    shapes = [(40, [8, 3]), (24, [2] * 20)]
    made = [packed_of(m, 90, bits, bits, 0, True) for m, bits in shapes]
    x, first = inputs(ROWS, 90, torch.float32), 0
    h = dk.shrink(x, [packed for packed, _ in made])
    assert h.shape == (dk.split_columns(DEVICE, ROWS, 90)[1], ROWS, 22)
    for packed, delta in made:
        weight = inputs(packed.m, 90, torch.float32, 1)
        y = dk.finish_linear(x, weight, None, h, packed, first)
        assert error(y, x.double() @ (weight.double() + delta).T) < 2e-6
        first += packed.rank


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
