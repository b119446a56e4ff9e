"""Metrics: what one unit of error costs in each direction, on the input or the output side.

A metric M is a symmetric positive matrix [d, d], a diagonal plus one of low rank, a diagonal [d],
or None for the identity. Layer error is measured as tr(Eᵀ·A·E·C) with A on outputs and C on inputs,
so all the pipeline needs of a metric is: products with it, damping, and a factor L with L·Lᵀ = M to
whiten with. Of D + Rᵀ·R, with B = R·D^-½, V·Λ·Vᵀ = B·Bᵀ and Q = Bᵀ·V·Λ^-½, that is

    L = D^½·(I + Q·(√(1 + Λ) − 1)·Qᵀ),    L⁻¹ = (I + Q·(1/√(1 + Λ) − 1)·Qᵀ)·D^-½

so at 32000 outputs no matrix of 4 GB is made, nor Q, which would be as large as R.

`SecondMoment` accumulates M = Σ x·xᵀ / N over batches. Up to FULL elements it keeps the matrix,
d²·4 bytes. Above, it keeps a sketch of SKETCH rows and the exact diagonal, (SKETCH + 1)·d·4 bytes:
rows x are added to the sketch with random signs, so E[SᵀS] = Σ x·xᵀ, and the result is rescaled to
the exact diagonal and averaged with it, because a sketch alone knows nothing outside its own span.
(Layer error at 1/16 on two down projections of SmolLM2-135M, sketch of n/7 rows: exact 0.038 and
0.024, sketch 0.067 and 0.043, averaged 0.052 and 0.032, diagonal alone 0.070 and 0.042.) Above
DIAGONAL elements (vocabularies) it keeps the diagonal alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cholesky import cholesky32


@dataclass(frozen=True)
class LowRank:
    """diag(weights) + rowsᵀ·rows, of `weights` [d] and `rows` [r, d], float32."""

    weights: Tensor
    rows: Tensor


@dataclass(frozen=True)
class LowRankRoot:
    """L of a `LowRank`: D^½ [d], R [r, d], V·Λ^-½ [r, k] and √(1 + Λ) [k], float32."""

    weights: Tensor
    rows: Tensor
    mix: Tensor
    growth: Tensor

    def spread(self, columns: Tensor, gains: Tensor) -> Tensor:
        """(I + Q·gains·Qᵀ) @ columns for columns `[d, n]`, in their place."""
        found = columns.new_zeros(len(self.rows), columns.shape[1])
        pieces = [t.split(_MULTIPLIED) for t in (columns, self.weights[:, None], self.rows.T)]
        for some, weights, rows in zip(*pieces, strict=True):
            found.addmm_(rows.T, some / weights)
        found = self.mix @ (gains[:, None] * (self.mix.T @ found))
        for some, weights, rows in zip(*pieces, strict=True):
            some.addmm_(rows / weights, found)
        return columns


Metric = Tensor | LowRank | None
Root = Tensor | LowRankRoot | None

FULL = 6144
SKETCH = 2048
DIAGONAL = 32768
_NOTHING = 2.0**-100
_MULTIPLIED = 4096  # rows at once
_MULTIPLIED_COLUMNS = 512  # of a triangular factor at once
_ADDED = 1 << 24  # elements at once: 67 MB, where 2048 rows of 128256 take 1.05 GB
_SUMMED = 256  # rows at once: in float64 a row of 28672 takes 229 kB


class SecondMoment:
    """Mean of x·xᵀ over rows x of size `dim`, accumulated in float32 on the rows' device.

    Sketches that are to be merged need a `seed` each: with equal signs their rows would correlate.
    """

    def __init__(
        self,
        dim: int,
        full: int = FULL,
        sketch: int = SKETCH,
        diagonal: int = DIAGONAL,
        seed: int = 0,
    ):
        self.dim = dim
        self.kind = "full" if dim <= full else "sketch" if dim <= diagonal else "diagonal"
        self.rows = {"full": dim, "sketch": sketch, "diagonal": 0}[self.kind]
        self.total: Tensor | None = None  # Σ x·xᵀ [d, d], or the sketch [rows, d]
        self.squares: Tensor | None = None  # Σ x² [d]
        self.count = 0
        self._random = torch.Generator().manual_seed(dim + 1_000_003 * seed)

    def add(self, rows: Tensor) -> None:
        """Add rows `[N, d]`."""
        for piece in rows.detach().reshape(-1, self.dim).split(max(1, _ADDED // (self.dim or 1))):
            self._add(piece.float())

    def _add(self, rows: Tensor) -> None:
        if self.total is None or self.squares is None:
            self.total, self.squares = rows.new_zeros(self.rows, self.dim), rows.new_zeros(self.dim)
        if self.kind == "full":
            self.total.addmm_(rows.T, rows)
        else:
            self.squares += rows.square().sum(0)
        if self.kind == "sketch":
            slots = (torch.arange(len(rows)) + self.count) % self.rows
            signs = torch.randint(0, 2, (len(rows), 1), generator=self._random) * 2 - 1
            self.total.index_add_(0, slots.to(rows.device), rows * signs.to(rows))
        self.count += len(rows)

    @property
    def nbytes(self) -> int:
        return 4 * (self.rows + (self.kind != "full")) * self.dim

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return its tensors and numbers, for `restored`."""
        tensors = {"total": self.total, "squares": self.squares}
        sizes = {"dim": self.dim, "count": self.count, "kind": self.kind, "rows": self.rows}
        return {key: t for key, t in tensors.items() if t is not None}, sizes

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], sizes: dict[str, Any]) -> SecondMoment:
        """Return the moment that gave this `state`, for reading and merging."""
        moment = cls(sizes["dim"])
        vars(moment).update(sizes | tensors)
        return moment

    def merge(self, other: SecondMoment) -> None:
        """Add the rows that another moment of the same sizes has seen."""
        self.count += other.count
        if self.total is None or self.squares is None:
            self.total, self.squares = other.total, other.squares
        elif other.total is not None and other.squares is not None:
            self.total += other.total
            self.squares += other.squares

    def mean(self, count: int | None = None) -> Tensor | LowRank:
        """Σ x·xᵀ / `count` (default: the rows seen) as a metric."""
        if self.total is None or self.squares is None:
            raise ValueError("nothing was accumulated")
        count = self.count if count is None else count
        if self.kind == "full":
            return self.total / count
        if self.kind == "diagonal":
            return self.squares / count
        scale = (self.squares / self.total.square().sum(0).clamp(min=1e-30)).sqrt()
        return LowRank(0.5 * self.squares / count, self.total * (scale * (0.5 / count) ** 0.5))


def dense(metric: Metric) -> Tensor | None:
    """The matrix [d, d] of a metric that has one; a diagonal stays [d], None stays None."""
    if not isinstance(metric, LowRank):
        return metric
    found = metric.rows.T @ metric.rows
    found.diagonal().add_(metric.weights)
    return found


def blended(metric: Metric, rows: Tensor, share: float) -> Tensor | LowRank:
    """(1 − share)·metric + share·rows·rowsᵀ, for rows `[d, k]`; a new tensor, None being I.

    The product is brought to the metric's mean diagonal first. Where the metric is a diagonal, or
    would be, so is the product.
    """
    dim = len(rows)
    if isinstance(metric, LowRank):
        known, found = diagonal(metric), rows.square().sum(1)
        assert known is not None
        size = share * known.mean() / found.mean().clamp(min=_NOTHING)
        parts = [metric.rows * (1 - share) ** 0.5, rows.T * size.sqrt()]
        return LowRank((1 - share) * metric.weights, torch.cat(parts))
    full = dim <= FULL if metric is None else metric.dim() == 2
    product = rows @ rows.T if full else rows.square().sum(1)
    sizes = product.diagonal() if full else product
    known = rows.new_ones(dim) if metric is None else metric
    mean = (known.diagonal() if known.dim() == 2 else known).mean()
    product *= share * mean / sizes.mean().clamp(min=_NOTHING)
    (sizes if known.dim() < product.dim() else product).add_(known, alpha=1 - share)
    return product


def shrunk(metric: Metric, share: float) -> Metric:
    """(1 − share)·metric + share·mean diagonal·I, a new tensor; None stays None."""
    if (known := diagonal(metric)) is None or metric is None:
        return None
    mean = known.mean()
    if isinstance(metric, LowRank):
        weights = (1 - share) * metric.weights + share * mean
        return LowRank(weights, metric.rows * (1 - share) ** 0.5)
    made = (1 - share) * metric
    (made if made.dim() == 1 else made.diagonal()).add_(share * mean)
    return made


def damped(metric: Metric, fraction: float) -> Metric:
    """`metric + fraction · mean(diag) · I`, a new tensor; None stays None."""
    if metric is None:
        return None
    if isinstance(metric, LowRank):
        mean = metric.weights.mean() + metric.rows.square().sum() / len(metric.weights)
        return LowRank(metric.weights + fraction * mean, metric.rows)
    if metric.dim() == 1:
        return metric + fraction * metric.mean()
    made = metric.clone()
    made.diagonal().add_(fraction * metric.diagonal().mean())
    return made


def diagonal(metric: Metric) -> Tensor | None:
    """The cost of each direction on its own, `[d]`; None stays None."""
    if isinstance(metric, LowRank):
        return metric.weights + metric.rows.square().sum(0)
    return metric.diagonal() if metric is not None and metric.dim() == 2 else metric


def times(rows: Tensor, metric: Metric) -> Tensor:
    """`rows @ metric` for rows `[k, d]`, in the rows' dtype."""
    if metric is None:
        return rows
    if isinstance(metric, LowRank):
        low = metric.rows.to(rows)
        return (rows * metric.weights.to(rows)).addmm_(rows @ low.T, low)
    metric = metric.to(rows)
    return rows * metric if metric.dim() == 1 else rows @ metric


def product(columns: Tensor, metric: Metric, other: Tensor) -> Tensor:
    """`columnsᵀ·M·other` `[k, l]` of columns `[d, k]` and `[d, l]`, without copies of either."""
    if isinstance(metric, LowRank):
        low = metric.rows.to(columns)
        return product(columns, metric.weights, other).addmm_((low @ columns).T, low @ other)
    if metric is None or metric.dim() == 2:
        return columns.T @ (other if metric is None else metric.to(other) @ other)
    found = columns.new_zeros(columns.shape[1], other.shape[1])
    for some, weights, rows in zip(
        *(t.split(_MULTIPLIED) for t in (columns, metric.to(columns), other)), strict=True
    ):
        found.addmm_((some * weights[:, None]).T, rows)
    return found


def energies(rows: Tensor, metric: Metric) -> Tensor:
    """`x·M·xᵀ` of every row, float64 `[k]`."""
    blocks = rows.split(_SUMMED)
    return torch.cat([(times(some, metric).double() * some).sum(1) for some in blocks])


def root(metric: Metric, damping: float = 0.0) -> Root:
    """L with L·Lᵀ = metric: a lower Cholesky factor float32 `[d, d]`, or a diagonal float64 `[d]`.

    `damping` times the mean of its diagonal is added first. It is factorised in float64; rounded,
    it takes half the memory and triangular solves are as good as rounding to 8 bits needs. Raises
    ValueError if the metric is not positive semi-definite.
    """
    if metric is None:
        return None
    if not isinstance(metric, LowRank) and metric.dim() == 2:
        return cholesky32(metric, damping)
    metric = damped(metric, damping)
    if isinstance(metric, Tensor):
        if bool((metric < 0).any()):
            raise ValueError("a diagonal metric has negative entries")
        return metric.double().sqrt()
    assert metric is not None
    weights, rows = metric.weights.double().clamp(min=_NOTHING).sqrt(), metric.rows
    scaled = rows / weights.to(rows)  # B [r, d]
    inner = (scaled @ scaled.T).double()
    del scaled
    values, vectors = torch.linalg.eigh(inner)
    kept = values > 1e-6  # the other directions are left to the diagonal
    values, vectors = values[kept], vectors[:, kept]
    mix = (vectors / values.sqrt()).to(rows)
    return LowRankRoot(weights.float(), rows, mix, (1 + values).sqrt().float())


def whiten(rows: Tensor, factor: Root) -> Tensor:
    """`rows @ L` for rows `[k, d]` and a `root` L."""
    if isinstance(factor, LowRankRoot):
        return factor.spread((rows * factor.weights).T, factor.growth - 1).T
    if factor is None or factor.dim() == 1:
        return times(rows, factor)
    return _times_lower(rows, factor.to(rows))


def whiten_left(columns: Tensor, factor: Root) -> Tensor:
    """`Lᵀ @ columns` for columns `[d, k]`, in their place where that saves a copy."""
    if isinstance(factor, LowRankRoot):
        return factor.spread(columns.mul_(factor.weights[:, None]), factor.growth - 1)
    if factor is None or factor.dim() == 1:
        return columns if factor is None else columns.mul_(factor.to(columns)[:, None])
    return _times_lower(columns.T, factor.to(columns)).T


def _times_lower(rows: Tensor, lower: Tensor) -> Tensor:
    """`rows @ lower` for a lower triangular matrix, without most of the products with its zeros."""
    if len(lower) < 2 * _MULTIPLIED_COLUMNS:
        return rows @ lower
    found = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start in range(0, len(lower), _MULTIPLIED_COLUMNS):
        some = slice(start, start + _MULTIPLIED_COLUMNS)
        torch.mm(rows[:, start:], lower[start:, some], out=found[:, some])
    return found


def unwhiten_left(columns: Tensor, factor: Root) -> Tensor:
    """`L⁻ᵀ @ columns`, the inverse of `whiten_left`, in their place where that saves a copy."""
    if isinstance(factor, LowRankRoot):
        return factor.spread(columns, 1 / factor.growth - 1).div_(factor.weights[:, None])
    if factor is None or factor.dim() == 1:
        return columns if factor is None else columns.div_(factor.to(columns)[:, None])
    solved = torch.linalg.solve_triangular(factor.T, columns.to(factor.dtype), upper=True)
    return solved.to(columns.dtype)


def unwhiten(rows: Tensor, factor: Root) -> Tensor:
    """`rows @ L⁻¹`, the inverse of `whiten`."""
    if factor is None:
        return rows
    if isinstance(factor, LowRankRoot) or factor.dim() == 1:
        return unwhiten_left(rows.T.clone(), factor).T
    solved = torch.linalg.solve_triangular(factor, rows.to(factor.dtype), upper=False, left=False)
    return solved.to(rows.dtype)
