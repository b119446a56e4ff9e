"""Sums of a stage: against float64, and the same bits whoever adds up which rows of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.compression import sequential_sums
from deltamix_hf.compression.sequential_sums import Rows, StageSums, all_rows
from deltamix_hf.jobs.workers import Workers


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sequential_sums, "PIECE", 5)


def batches(n, m, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(n + m)

    def rows(count, width):
        return torch.randn(2, count, width, generator=random).to(dtype)

    sizes = (3, 1, 7)
    if not m:
        return [Rows(rows(c, n), rows(c, n)) for c in sizes]
    return [Rows(rows(c, n), rows(c, n), rows(c, m), rows(c, m)) for c in sizes]


class Alone(Workers):
    """Adds up its share and leaves the others' at zero."""

    def add_up(self, tensor):
        pass


def added(n, m, workers):
    sums = StageSums(n, torch.device("cpu"), workers)
    for rows in batches(n, m):
        sums.add(rows)
    sums.finish()
    return [total for total in (sums.inputs, sums.drift, sums.lag) if total is not None]


@pytest.mark.parametrize("m", [0, 13])
def test_against_float64(m):
    found = added(17, m, Workers())
    expected = [0, 0, 0]
    for rows in batches(17, m):
        x, reference = (t.flatten(0, -2).double() for t in (rows.compressed, rows.reference))
        expected[0] += x.T @ x
        expected[1] += (reference - x).T @ x
        if m:
            late = (
                rows.reference_residual - rows.compressed_residual
            )  # in the model's dtype, as it runs
            expected[2] += late.flatten(0, -2).double().T @ x
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert len(found) == 2 + bool(m)


@given(n=st.integers(1, 23), m=st.integers(0, 23), size=st.integers(1, 6))
def test_shares_make_up_the_whole_to_the_bit(n, m, size):
    shares = [added(n, m, Alone(rank, size)) for rank in range(size)]
    for whole, *parts in zip(added(n, m, Workers()), *shares, strict=True):
        assert torch.equal(sum(parts), whole)
        used = [part != 0 for part in parts]
        assert sum(used).max() <= 1  # no row is added up twice


@given(n=st.integers(1, 9), m=st.integers(0, 9))
def test_rows_travel_as_one_tensor(n, m):
    for rows in batches(n, m):
        back = Rows.split(rows.joined(), n)
        for key, value in vars(rows).items():
            other = getattr(back, key)
            assert other is None if value is None else torch.equal(other, value.flatten(0, -2))


class Shown(Workers):
    """One of several workers, which show each other three batches in turn."""

    def show(self, tensor, owner):
        shown = next(turns)
        if tensor is None:
            return shown
        assert owner == self.rank and torch.equal(tensor, shown)
        return tensor


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (1, 3), (3, 5)])
def test_all_rows_come_in_the_order_of_the_batches(rank, size):
    global turns
    workers, rows = Shown(rank, size), batches(4, 3)
    turns = iter([r.joined() for r in rows])
    own = iter([rows[b] for b in workers.share(len(rows))])
    found = list(all_rows(own, 4, len(rows), [], workers))
    assert [r.joined().tolist() for r in found] == [r.joined().tolist() for r in rows]
