"""Sum what the sequential correction needs over the calibration text, for one stage of a block.

With x_f, r_f and x_c, r_c the inputs and residual streams of the fine-tune and of the compressed
model (`sequential.py`), the sums C = Σ x_c·x_cᵀ, Σ (x_f − x_c)·x_cᵀ and Σ (r_f − r_c)·x_cᵀ; and
from them, with λ = RIDGE·mean(diag C), how far the targets of the stage's layers move:

    (W_ft·Σ(x_f − x_c)·x_cᵀ + Σ(r_f − r_c)·x_cᵀ) · (C + λI)⁻¹

Several workers run a share of the batches each and show each other the rows. Then each adds up all
batches, in their order, for its share of the sums' rows, in pieces of PIECE rows. So every number
is made by the same products in the same order however many workers there are. A row of the moved
targets needs one row of W_ft, so workers share those rows too: at 4096 x 11008 that is 28 of the
185 s that one thread takes for the matrix, whose stage has no other to share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.block_chain import TensorList
from ..jobs.workers import Workers
from ..linalg.cholesky import cholesky

PIECE = 256  # rows of a sum that are always made together


@dataclass
class Rows:
    """Inputs x [..., n] of a layer and residual streams r [..., m] for one batch."""

    reference: Tensor
    compressed: Tensor
    reference_residual: Tensor | None = None
    compressed_residual: Tensor | None = None

    def joined(self) -> Tensor:
        """One tensor [tokens, 2n + 2m]."""
        parts = [self.reference, self.compressed, self.reference_residual, self.compressed_residual]
        return torch.cat([part.flatten(0, -2) for part in parts if part is not None], -1)

    @classmethod
    def split(cls, joined: Tensor, n: int) -> Rows:
        """What `joined` gave for layers of n inputs."""
        m = (joined.shape[-1] - 2 * n) // 2
        return cls(*joined.split([n, n, m, m] if m else [n, n], -1))


class StageSums:
    """The three sums for a layer of n inputs, float32.

    Attributes:
        inputs: C, `[n, n]`.
        drift: of the inputs, `[n, n]`.
        lag: of the residual stream, `[m, n]`, or None where there is none.
        count: rows added.
    """

    def __init__(self, n: int, device: torch.device, workers: Workers):
        self.workers, self.count = workers, 0
        self.inputs = torch.zeros(n, n, device=device)
        self.drift = torch.zeros(n, n, device=device)
        self.lag: Tensor | None = None

    def add(self, rows: Rows) -> None:
        """Add this worker's share of the products of one batch."""
        n = len(self.inputs)
        x = rows.compressed.reshape(-1, n).to(self.inputs)
        self._add(self.inputs, x, x)
        self._add(self.drift, rows.reference.reshape(-1, n).to(x) - x, x)
        if rows.reference_residual is not None and rows.compressed_residual is not None:
            late = (rows.reference_residual - rows.compressed_residual).flatten(0, -2).to(x)
            if self.lag is None:
                self.lag = x.new_zeros(late.shape[-1], n)
            self._add(self.lag, late, x)
        self.count += len(x)

    def _add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        pieces = -(-len(total) // PIECE)
        for i in self.workers.share(pieces):
            rows = slice(i * PIECE, (i + 1) * PIECE)
            total[rows].addmm_(left[:, rows].T, right)

    def finish(self) -> None:
        """Have the other workers' shares too."""
        for total in (self.inputs, self.drift, self.lag):
            if total is not None:
                self.workers.add_up(total)  # what is another's share is zero here


def all_rows(
    own: Iterator[Rows], n: int, count: int, tensor_list: TensorList, workers: Workers
) -> Iterator[Rows]:
    """Rows of all `count` batches in their order, of which this worker makes its `own`.

    `tensor_list` keeps them until it is their turn.
    """
    if workers.size == 1:
        yield from own
        return
    for rows in own:
        tensor_list.append(rows.joined())
    mine = workers.share(count)
    for rank in range(workers.size):
        for b in Workers(rank, workers.size).share(count):
            shown = tensor_list[b - mine.start] if rank == workers.rank else None
            yield Rows.split(workers.show(shown, rank), n)


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


def target_shift(
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
