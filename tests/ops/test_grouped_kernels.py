"""The grouped kernels against float64, by Triton's interpreter where there is no GPU.

Errors and tolerances are those of `test_decode_kernels.py`; the base's product is rounded once
more.
"""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from deltamix_kernels import grouped_launch
from kernel_cases import DEVICE, EVERY, TOLERANCES, error, inputs, packed_of, poisoned
from torch.nn import functional as F

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.untraced

__all__ = ["poisoned"]  # a fixture for every test here too
MIXED = [8, 3, 3, 2, 1], [2, 3, 4, 2, 6]
LAYOUTS = [  # m, n, group_size, widths of two deltas
    pytest.param(50, 130, 0, (EVERY, EVERY[::-1]), MIXED, id="every width"),
    pytest.param(33, 64, 0, ([4], [2]), MIXED, id="rank 1"),
    pytest.param(64, 64, 0, ([3] * 20 + [2] * 9, [2] * 20 + [4] * 9), MIXED, id="many tiles"),
]
EMBEDDINGS = [
    LAYOUTS[0],
    pytest.param(130, 50, (0, 128), ([4], [2]), (EVERY, EVERY), id="groups of U, rank 1"),
]
ROWS = [  # dtype; slot of each row, or -1 (5: an empty slot); length
    (torch.float16, [3], 1),
    (torch.bfloat16, [3, 5, 7, -1, 3], 3),
    (torch.float16, [7, -1, 3], 1),
]
HALF = torch.float16


def rows_of(slots, entries=None):
    """`Rows` of a batch; `entries` as if the batch could have so many deltas."""
    distinct = sorted({slot for slot in slots if slot >= 0})
    order = sorted(range(len(slots)), key=lambda i: (slots[i] < 0, slots[i]))
    starts = [0]
    for slot in distinct:
        starts.append(starts[-1] + slots.count(slot))
    idle = (entries or len(distinct)) - len(distinct)
    lists = order, starts + starts[-1:] * idle, distinct + [0] * idle
    return dk.Rows(*(torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in lists))


def deltas_of(m, n, group_size, *widths):
    """Slot -> (packed, dense)."""
    made = [packed_of(m, n, *pair, group_size, True) for pair in widths]
    return dict(zip((3, 7), made, strict=False))


def table_of(m, n, deltas, dtype=HALF, embedding=False):
    table = dk.Table(8, m, n, DEVICE, embedding)
    for slot, (packed, _) in deltas.items():
        assert table.put(slot, packed, dtype)
    return table


def expected_of(base, x, slots, deltas):
    """Float64; `base` and x have one dimension for the rows named in `slots`."""
    added = [
        x[i].double() @ deltas[slot][1].T if slot in deltas else torch.zeros_like(base[i]).double()
        for i, slot in enumerate(slots)
    ]
    return base.double() + torch.stack(added)


@pytest.mark.parametrize("dtype, slots, length", ROWS, ids=str)
@pytest.mark.parametrize("m, n, group_size, one, two", LAYOUTS)
def test_against_float64(m, n, group_size, one, two, dtype, slots, length):
    deltas = deltas_of(m, n, group_size, one, two)
    table = table_of(m, n, deltas, dtype)
    x = inputs(len(slots) * length, n, dtype).view(len(slots), length, n)
    base = F.linear(x, inputs(m, n, dtype, 1))
    found = []
    for entries in (None, len(slots)):
        y = base.clone()
        dk.grouped_add(y, x, table, rows_of(slots, entries))
        found.append(y)
    assert error(found[0], expected_of(base, x, slots, deltas)) < TOLERANCES[dtype]
    assert torch.equal(*found)  # bit for bit, though the grids differ
    untouched = [i for i, slot in enumerate(slots) if slot not in deltas]
    assert torch.equal(found[0][untouched], base[untouched])


@pytest.mark.parametrize("rows, length", [(64, 1), (3, 40)])
def test_many_rows(rows, length, monkeypatch):
    """Decoding 64 rows, and prompts of more rows than are handled at a time."""
    monkeypatch.setattr(grouped_launch, "CHUNK", 50)
    deltas = deltas_of(50, 130, 0, MIXED, (EVERY, EVERY))
    slots = [(3, -1, 7)[i % 3] for i in range(rows)]
    x = inputs(rows * length, 130, torch.bfloat16).view(rows, length, 130)
    base = F.linear(x, inputs(50, 130, torch.bfloat16, 1))
    y = base.clone()
    dk.grouped_add(y, x, table_of(50, 130, deltas, torch.bfloat16), rows_of(slots))
    assert error(y, expected_of(base, x, slots, deltas)) < TOLERANCES[torch.bfloat16]
    assert torch.equal(y[1::3], base[1::3])


def test_rows_that_no_delta_has_are_not_even_read():
    deltas = deltas_of(50, 130, 0, MIXED)
    x = inputs(2, 130, HALF)
    x[1] = y1 = float("nan")
    y = torch.full((2, 50), y1, dtype=HALF, device=DEVICE)
    y[0] = 0
    dk.grouped_add(y, x, table_of(50, 130, deltas), rows_of([3, -1]))
    assert error(y[:1], x[:1].double() @ deltas[3][1].T) < TOLERANCES[HALF] and y[1].isnan().all()


def test_tenants_change_in_the_same_tensors():
    """Another delta in a slot, and other rows, by nothing but what the tables hold."""
    deltas = deltas_of(50, 130, 0, MIXED, (EVERY, EVERY))
    table = table_of(50, 130, {3: deltas[7]})
    rows = rows_of([3, -1, -1], 3)
    addresses = [t.data_ptr() for t in (table.data, *rows)]
    assert table.put(3, deltas[3][0], HALF) and table.put(7, deltas[7][0], HALF)
    for tensor, value in zip(rows, rows_of([7, 3, 7], 3), strict=True):
        tensor.copy_(value)
    assert addresses == [t.data_ptr() for t in (table.data, *rows)]
    x = inputs(3, 130, HALF)
    y = torch.zeros(3, 50, dtype=HALF, device=DEVICE)
    dk.grouped_add(y, x, table, rows)
    assert error(y, expected_of(torch.zeros_like(y), x, [7, 3, 7], deltas)) < TOLERANCES[HALF]
    table.clear(3)
    y = torch.zeros(3, 50, dtype=HALF, device=DEVICE)
    dk.grouped_add(y, x, table, rows)
    assert (
        torch.equal(y[1], torch.zeros_like(y[1]))
        and table.data[7].count_nonzero() == table.data.count_nonzero()
    )


@pytest.mark.parametrize("own", [None, 3])
def test_a_bias_in_place_of_the_base_s(own):
    deltas = deltas_of(50, 130, 0, MIXED)
    table = dk.Table(8, 50, 130, DEVICE)
    bias, other = inputs(2, 50, HALF, 2)
    assert table.put(3, deltas[3][0] if own else None, HALF, other)
    x, weight = inputs(3, 130, HALF), inputs(50, 130, HALF, 1)
    base = F.linear(x, weight, bias)
    y = base.clone()
    dk.grouped_add(y, x, table, rows_of([-1, 3, -1]), bias)
    expected = x[1].double() @ weight.double().T + other
    expected += x[1].double() @ deltas[3][1].T if own else 0
    assert error(y[1], expected) < TOLERANCES[HALF]
    assert torch.equal(y[::2], base[::2])


@pytest.mark.parametrize("dtype", dk.DECODE_DTYPES, ids=str)
@pytest.mark.parametrize("m, n, group_size, one, two", EMBEDDINGS)
def test_embedded_rows(m, n, group_size, one, two, dtype):
    deltas = deltas_of(m, n, group_size, one, two)
    table, slots = table_of(m, n, deltas, dtype, embedding=True), [7, -1, 3]
    ids = torch.randint(m, (3, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    base = F.embedding(ids, inputs(m, n, dtype, 1))
    y = base.clone()
    dk.grouped_embed(y, ids, table, rows_of(slots))
    expected = base.double()
    for i in (0, 2):
        expected[i] += deltas[slots[i]][1][ids[i]]
    assert error(y, expected) < TOLERANCES[dtype]
    assert torch.equal(y[1], base[1])
    alone = base[2, :1].clone()
    dk.grouped_embed(alone, ids[2, :1], table, rows_of([3]))
    assert torch.equal(alone, y[2, :1])  # whatever else is in the batch


def test_gathered_vectors():
    base, own = inputs(2, 50, torch.bfloat16)
    base[0] = -0.0
    addresses = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    addresses[3] = own.data_ptr()
    slots = torch.tensor([3, -1, 5], dtype=torch.int32, device=DEVICE)
    found = dk.gather(base, addresses, slots)
    bits = torch.stack([own, base, base]).view(torch.int16)
    assert torch.equal(found.view(torch.int16), bits)


def test_what_a_table_cannot_hold():
    linear, rows = (dk.Table(8, 50, 130, DEVICE, embedding) for embedding in (False, True))
    plain, grouped = (packed_of(50, 130, *MIXED, size, True)[0] for size in (0, (0, 16)))
    for table in (linear, rows):
        assert not table.put(0, plain, torch.float32)
        assert not table.put(0, None, torch.float32, torch.zeros(50, device=DEVICE))
        assert not table.put(0, packed_of(50, 130, *MIXED, 0, False)[0], HALF)  # zero points
        assert not table.put(0, packed_of(50, 130, *MIXED, 32, True)[0], HALF)  # groups of V
        assert not table.put(0, packed_of(50, 130, [1] * 51, [1] * 51, 0, True)[0], HALF)
        assert table.data.count_nonzero() == 0
    assert not linear.put(0, grouped, HALF)
    assert rows.put(0, plain, HALF) and not rows.put(1, grouped, HALF)
    rows.clear(0)
    assert rows.put(1, grouped, HALF) and rows.group == 16
    rows.clear(1)
    rows.captured = True
    assert not rows.put(0, plain, HALF) and rows.put(0, grouped, HALF)


def test_a_captured_table_takes_no_width_that_was_not_compiled():
    usual, other = (packed_of(50, 130, [b], [b], 0, True)[0] for b in (3, 5))
    table = dk.Table(8, 50, 130, DEVICE)
    assert table.put(0, usual, HALF)
    table.captured = True
    assert not table.put(1, other, HALF)
    table.captured = False
    assert table.put(1, other, HALF) and table.put(2, usual, HALF)


def test_nothing_to_do():
    deltas = deltas_of(50, 130, 0, MIXED)
    table, nothing = table_of(50, 130, deltas), rows_of([-1, -1], 2)
    x, y = inputs(2, 130, HALF), inputs(2, 50, HALF, 1)
    before = y.clone()
    dk.grouped_add(y, x, table, nothing)
    assert torch.equal(y, before)
    dk.grouped_add(y[:0].view(2, 0, 50), x[:0].view(2, 0, 130), table, nothing)
