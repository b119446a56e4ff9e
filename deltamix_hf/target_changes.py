"""How far the targets of one stage move for what their layers will really receive.

From the stage's sums (`stage_sums.py`), with λ = RIDGE·mean(diag C):

    (W_ft·Σ(x_f − x_c)·x_cᵀ + Σ(r_f − r_c)·x_cᵀ) · (C + λI)⁻¹,   C = Σ x_c·x_cᵀ

A row of it needs one row of W_ft, so workers share the rows, in pieces of PIECE. At 4096 x 11008
that is 28 of the 185 s that one thread takes for the matrix, whose stage has no other to share.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .cholesky import cholesky
from .stage_sums import PIECE, StageSums
from .workers import Workers

RIDGE = 0.03


def moved_rows(matrix: Tensor, sums: StageSums, workers: Workers) -> Tensor:
    """This worker's rows of what is in the brackets, float32, for W_ft `[m, n]` of any dtype."""
    rows = _rows(len(matrix), workers)
    found = torch.empty(len(rows), matrix.shape[1], device=sums.drift.device)
    for start in range(rows.start, rows.stop, PIECE):
        piece = slice(start, min(start + PIECE, rows.stop))
        # A tensor of its own: where in `found` it begins could change BLAS's last digit.
        made = matrix[piece].to(found) @ sums.drift
        if sums.lag is not None:
            made += sums.lag[piece]
        found[piece.start - rows.start : piece.stop - rows.start] = made
    return found


def target_changes(
    moved: dict[str, Tensor],
    heights: Mapping[str, int],
    owners: Mapping[str, int],
    sums: StageSums,
    workers: Workers,
) -> dict[str, Tensor]:
    """Changes float32 `[m, n]` of those targets that this worker owns.

    `moved` holds its rows of every target and is used up, `heights` every m. Of the sums only C is
    left, as a mean.
    """
    del sums.drift, sums.lag  # 485 MB at 11008 inputs, as are the two below
    inner = sums.inputs.div_(sums.count)
    lower = cholesky(inner, RIDGE)
    triangular = torch.linalg.solve_triangular  # cholesky_solve would copy 970 MB of factor
    for share in moved.values():
        for rows in share.split(PIECE):  # in float64 23 MB each
            half = triangular(lower, (rows / sums.count).double().T, upper=False)
            rows.copy_(triangular(lower.T, half, upper=True).T)
    del lower
    changes = {}
    for name in list(moved):
        whole = _gathered(moved.pop(name), heights[name], owners[name], workers)
        if whole is not None:
            changes[name] = whole
    return changes


def _rows(m: int, workers: Workers) -> range:
    """A worker's share of m rows: whole pieces but for the last."""
    pieces = workers.share(-(-m // PIECE))
    return range(pieces.start * PIECE, min(pieces.stop * PIECE, m))


def _gathered(share: Tensor, m: int, owner: int, workers: Workers) -> Tensor | None:
    """All rows `[m, n]` of a target for who owns it."""
    if workers.size == 1:
        return share
    whole = share.new_empty(m, share.shape[1]) if owner == workers.rank else None
    for rank in range(workers.size):
        rows = _rows(m, Workers(rank, workers.size))
        if not len(rows):  # fewer pieces than workers
            continue
        shown = workers.show(share if rank == workers.rank else None, rank)
        if whole is not None:
            whole[rows.start : rows.stop] = shown.to(whole)
    return whole
