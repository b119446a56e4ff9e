"""No kernel reads or writes outside the tensors that it was given."""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels.decode_plan import DecodePlan
from kernel_bounds import bounds_checked
from kernel_cases import DEVICE, EVERY, inputs, packed_of

pytestmark = [
    pytest.mark.untraced,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="needs the interpreter"),
]

M, N = 35, 75  # no multiples of a byte column, a tile or 16
LAYOUTS = {
    "every width": (EVERY, EVERY[::-1], 0, True),
    "groups of U": ([8, 3, 2], [2, 3, 2], (0, 16), True),
    "min-max": ([3, 3, 2], [3, 3, 2], 32, False),
}


def own_storage(tensor):
    """A copy that ends where its storage does, so that a byte too far shows."""
    return tensor.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("rows", [1, 65])
def test_one_delta(layout, rows):
    packed, _ = packed_of(M, N, *layout)
    weight, bias = inputs(M, N, torch.float16, 1), inputs(1, M, torch.float16, 2)[0]
    with bounds_checked() as checked:
        dk.delta_linear(inputs(rows, N, torch.float16), weight, own_storage(bias), packed)
        dk.low_rank(inputs(rows, M, torch.float16), packed, transposed=True)
    assert checked.accesses


@pytest.mark.parametrize("rows", [1, 19])
def test_many_deltas(rows):
    packed = packed_of(M, N, *LAYOUTS["every width"])[0]
    tables = [dk.Table(3, M, N, DEVICE, embedding) for embedding in (False, True)]
    for table in tables:
        assert table.put(0, packed, torch.float16) and table.put(2, packed, torch.float16)
    order, half = torch.arange(rows, dtype=torch.int32), rows // 2
    starts = torch.tensor([0, half, rows], dtype=torch.int32)
    of_batch = dk.Rows(order, starts, torch.tensor([0, 2], dtype=torch.int32))
    found_by_address = [t for table in tables for kept in table._kept.values() for t in kept]
    y, embedded = inputs(rows, M, torch.float16, 3), inputs(rows, N, torch.float16, 4)
    with bounds_checked(*found_by_address) as checked:
        dk.grouped_add(y, inputs(rows, N, torch.float16), tables[0], of_batch)
        dk.grouped_embed(embedded, torch.arange(rows) % M, tables[1], of_batch)
    assert checked.accesses


def test_gather():
    vectors = [inputs(1, N, torch.float16, seed)[0] for seed in range(2)]
    base, own = (own_storage(vector) for vector in vectors)
    of_rows = torch.tensor([0, -1], dtype=torch.int32)
    with bounds_checked(own) as checked:
        dk.gather(base, torch.tensor([own.data_ptr()]), of_rows)
    assert checked.accesses


@pytest.mark.parametrize("n", [72, N])
@pytest.mark.parametrize("rows", [1, 9, 17])
def test_decode_kernels(rows, n):
    packed = [packed_of(m, n, [8, 3, 2], [2, 3, 2], 0, True)[0] for m in (40, 17)]
    plan, x = DecodePlan(packed, torch.float16), inputs(rows, n, torch.float16)
    weights = [own_storage(inputs(m, n, torch.float16)) for m in (40, 17)]
    biases = [own_storage(inputs(1, m, torch.float16)[0]) for m in (40, 17)]
    with bounds_checked() as checked:
        plan.linear(x, weights, biases)
    assert checked.accesses


def test_an_access_past_the_end_is_found():
    packed, _ = packed_of(M, N, *LAYOUTS["every width"])
    short = packed._replace(v=own_storage(packed.v[:-1]))
    with bounds_checked(), pytest.raises(Exception, match="outside every tensor"):
        dk.dequantize(short, 0, torch.float16)
