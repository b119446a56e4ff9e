"""What the sequential correction adds up over the calibration text for one stage of a block.

With x_f, r_f and x_c, r_c the inputs and residual streams of the fine-tune and of the compressed
model (`sequential.py`), the sums C = Σ x_c·x_cᵀ, Σ (x_f − x_c)·x_cᵀ and Σ (r_f − r_c)·x_cᵀ.

Several workers run a share of the batches each and show each other the rows. Then each adds up all
batches, in their order, for its share of the sums' rows, in pieces of PIECE rows. So every number
is made by the same products in the same order however many workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .stack import Shelf
from .workers import Workers

PIECE = 256  # rows of a sum that are always made together


@dataclass
class Rows:
    """Inputs x [..., n] of a layer and residual streams r [..., m] for one batch."""

    exact: Tensor
    coarse: Tensor
    exact_residual: Tensor | None = None
    coarse_residual: Tensor | None = None

    def joined(self) -> Tensor:
        """One tensor [tokens, 2n + 2m]."""
        parts = [self.exact, self.coarse, self.exact_residual, self.coarse_residual]
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
        x = rows.coarse.reshape(-1, n).to(self.inputs)
        self._add(self.inputs, x, x)
        self._add(self.drift, rows.exact.reshape(-1, n).to(x) - x, x)
        if rows.exact_residual is not None and rows.coarse_residual is not None:
            late = (rows.exact_residual - rows.coarse_residual).flatten(0, -2).to(x)
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
    own: Iterator[Rows], n: int, count: int, shelf: Shelf, workers: Workers
) -> Iterator[Rows]:
    """Rows of all `count` batches in their order, of which this worker makes its `own`.

    `shelf` keeps them until it is their turn.
    """
    if workers.size == 1:
        yield from own
        return
    for rows in own:
        shelf.append(rows.joined())
    mine = workers.share(count)
    for rank in range(workers.size):
        for b in Workers(rank, workers.size).share(count):
            shown = shelf[b - mine.start] if rank == workers.rank else None
            yield Rows.split(workers.show(shown, rank), n)
