"""Sum what the sequential correction needs over the calibration text, for one stage of a block.

With x_f, r_f and x_c, r_c the inputs and residual streams of the fine-tune and of the compressed
model (`sequential.py`), the sums C = Σ x_c·x_cᵀ, Σ (x_f − x_c)·x_cᵀ and Σ (r_f − r_c)·x_cᵀ; and
from them, with λ = (RIDGE + prior·n/tokens)·mean(diag C), how far the targets of the stage move:

    (W_ft·Σ(x_f − x_c)·x_cᵀ + Σ(r_f − r_c)·x_cᵀ) · (C + λI)⁻¹

Several workers add up a share of the batches each and all-reduce the sums. A row of a moved target
needs one row of W_ft, so workers share those rows too: at 4096 x 11008 that is 28 of the 185 s that
one thread takes for the matrix, whose stage has no other to share.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..jobs.workers import Workers
from ..linalg.cholesky import cholesky32

RIDGE = 0.03
_ROWS = 1024  # of a target at once: 45 MB at 11008 inputs


class StageSums:
    """The three sums for layers [m, n] of a stage, float32."""

    def __init__(self, m: int, n: int, residual: bool, device: torch.device):
        self.count = 0  # rows added
        self.inputs = torch.zeros(n, n, device=device)  # C
        self.drift = torch.zeros(n, n, device=device)  # of the inputs
        self.lag = torch.zeros(m, n, device=device) if residual else None  # of the residual stream

    def add(
        self, reference: Tensor, compressed: Tensor, residuals: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add a batch of any dtype: inputs [..., n] of both models, residual streams [..., m]."""
        x = compressed.flatten(0, -2).to(self.inputs)
        self.inputs.addmm_(x.T, x)
        self.drift.addmm_((reference.flatten(0, -2).to(x) - x).T, x)
        if self.lag is not None and residuals is not None:
            self.lag.addmm_((residuals[0] - residuals[1]).flatten(0, -2).to(x).T, x)
        self.count += len(x)

    def reduce(self, workers: Workers) -> None:
        """All-reduce the sums of the workers' batches."""
        count = torch.tensor(self.count)
        for total in (self.inputs, self.drift, self.lag, count):
            if total is not None:
                workers.add_up(total)
        self.count = int(count)


def moved_targets(
    weights: Mapping[str, Tensor], sums: StageSums, workers: Workers
) -> dict[str, Tensor]:
    """Multiply out the brackets for W_ft `[m, n]` of any dtype, by name.

    Returns float32 `[m, n]`: this worker's rows, and 0 in the others'.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        moved = found[name] = sums.drift.new_zeros(weight.shape)
        for rows in _pieces(workers.share(len(weight))):
            # A tensor of its own: where in `moved` it begins could change BLAS's last digit.
            piece = weight[rows].to(moved) @ sums.drift
            moved[rows] = piece if sums.lag is None else piece.add_(sums.lag[rows])
    return found


def target_shift(
    moved: dict[str, Tensor],
    owners: Mapping[str, int],
    sums: StageSums,
    workers: Workers,
    prior: float = 0.0,
) -> dict[str, Tensor]:
    """Solve for the changes float32 `[m, n]` of those targets that this worker owns.

    `moved` is `moved_targets` and is used up. Of the sums only C is left, as a mean.
    """
    del sums.drift, sums.lag  # 485 MB at 11008 inputs, as are the two below
    # In float32: with the ridge, six shifts of SmolLM2-135M differed from float64's by 2e-6 to 6e-5
    # of their size.
    ridge = RIDGE + prior * len(sums.inputs) / sums.count
    lower = cholesky32(sums.inputs.div_(sums.count), ridge)
    triangular = torch.linalg.solve_triangular  # cholesky_solve would copy the factor
    for whole in moved.values():
        for rows in _pieces(workers.share(len(whole))):
            half = triangular(lower, (whole[rows] / sums.count).T, upper=False)
            whole[rows] = triangular(lower.T, half, upper=True).T
    del lower
    changes = {}
    for name in list(moved):
        whole = moved.pop(name)
        workers.add_up(whole)
        if owners[name] == workers.rank:
            changes[name] = whole
    return changes


def _pieces(rows: range) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, _ROWS):
        yield slice(start, min(start + _ROWS, rows.stop))
