"""Changes of a stage's targets: against float64, and the same bits whoever makes which rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.compression import sequential_sums as module
from deltamix_hf.compression.sequential_sums import RIDGE, StageSums, moved_rows, target_shift
from deltamix_hf.jobs.workers import Workers


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 5)


class Board(Workers):
    """Sees what others have shown on the board; who has not come yet shows zeros."""

    def on(self, board, shapes):
        self.__dict__.update(board=board, shapes=iter(shapes))
        return self

    def show(self, tensor, owner):
        at = next(self.shapes)
        if tensor is not None:
            self.board[at] = tensor
        return self.board.get(at, torch.zeros(()))


def sums_of(n, lag=None, tokens=40):
    random = torch.Generator().manual_seed(n)
    x, drift = torch.randn(2, tokens, n, generator=random)
    sums = StageSums(n, torch.device("cpu"), Workers())
    sums.inputs, sums.drift, sums.count = x.T @ x, 0.1 * drift.T @ x, tokens
    if lag is not None:
        sums.lag = 0.1 * torch.randn(lag, tokens, generator=random) @ x
    return sums


def matrices(heights, n):
    random = torch.Generator().manual_seed(n)
    return {f"{m}": torch.randn(m, n, generator=random).to(torch.bfloat16) for m in heights}


def changes(heights, n, lag, workers=None, owners=None):
    workers, sums = workers or Workers(), sums_of(n, lag)
    moved = {name: moved_rows(w, sums, workers) for name, w in matrices(heights, n).items()}
    sizes = {name: int(name) for name in moved}
    return target_shift(moved, sizes, owners or dict.fromkeys(moved, 0), sums, workers), sums


@pytest.mark.parametrize("lag", [None, 13])
def test_against_float64(lag):
    heights = [13] if lag else [13, 1, 30]
    found, left = changes(heights, 17, lag)
    sums = sums_of(17, lag)
    gram = sums.inputs.double() / sums.count
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(17, dtype=torch.float64)
    for name, weight in matrices(heights, 17).items():
        expected = weight.double() @ sums.drift.double()
        if lag:
            expected += sums.lag.double()
        expected = expected / sums.count @ torch.linalg.inv(gram + ridge)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.inputs.double(), gram, rtol=1e-6, atol=1e-6)
    assert not hasattr(left, "drift") and not hasattr(left, "lag")


@given(
    heights=st.lists(st.integers(1, 23), min_size=1, max_size=3, unique=True),
    n=st.integers(2, 19),
    size=st.integers(2, 6),
    lag=st.booleans(),
)
def test_workers_make_the_rows_of_one_to_the_bit(heights, n, size, lag):
    heights = heights[: 1 if lag else 3]
    more = heights[0] if lag else None
    expected, _ = changes(heights, n, more)
    owners = {name: i % size for i, name in enumerate(expected)}
    order = [
        (name, rank)
        for name in expected
        for rank in range(size)
        if len(Workers(rank, size).share(-(-int(name) // 5)))
    ]
    board = {}
    for _ in range(2):  # the second time all have come
        found = {}
        for rank in range(size):
            made, _ = changes(heights, n, more, Board(rank, size).on(board, order), owners)
            assert all(owners[name] == rank for name in made)
            found |= made
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(len(rows) for rows in board.values()) == sum(heights)  # none twice
