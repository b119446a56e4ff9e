"""Cholesky factors of second moments, which may be large, singular, and of any scale.

They run in float64 on the matrix scaled to unit diagonal: the rank Hessians of GPTQ carry 1/sigma^2
terms over many orders of magnitude. Nothing is copied that need not be: of 11008 inputs, a float64
matrix takes 970 MB.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_COPIED = 1024  # rows at once
_WHOLE = 4096  # coordinates that are factorised together: in float64 11008 of them take 970 MB

# Damping added to a unit-diagonal Hessian, in turn, until it factorises.
_RETRIES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1e-1)


def cholesky(matrix: Tensor, damping: float = 0.0, order: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor, float64, of a symmetric positive semi-definite `[k, k]` matrix.

    `damping` times the mean of the diagonal is added to it first, and rows and columns are taken in
    `order` int64 `[k]`, both without a copy. Zero diagonal entries are isolated unit entries. A
    failure is retried with more of the unit diagonal added, from 1e-8 to 0.1; beyond that, and for
    NaN, it raises ValueError.
    """
    unit = _Unit(matrix, damping, order)
    return unit.factorised(lambda extra: _factor(unit.block(0, 0, len(matrix), extra)))


def cholesky32(matrix: Tensor, damping: float = 0.0, order: Tensor | None = None) -> Tensor:
    """`cholesky` rounded to float32, in two thirds of its memory where that is much.

    Halves of large matrices are factorised in turn, each in float64.
    """
    size = len(matrix)
    if size <= _WHOLE:
        return cholesky(matrix, damping, order).float()
    half, unit = size // 2, _Unit(matrix, damping, order)

    def attempt(extra: float) -> Tensor | None:
        found = torch.zeros(size, size, device=matrix.device)
        if (corner := _factor(unit.block(0, 0, half, extra))) is None:
            return None
        below = unit.block(half, 0, half)  # as many columns as the corner
        for rows in below.split(_COPIED):  # L₂₁ = A₂₁·L₁₁⁻ᵀ
            rows.copy_(torch.linalg.solve_triangular(corner, rows.T, upper=False).T)
        found[:half, :half] = corner
        del corner
        found[half:, :half] = below
        rest = unit.block(half, half, size - half, extra)
        rest.addmm_(below, below.T, alpha=-1)
        del below
        if (last := _factor(rest)) is None:
            return None
        found[half:, half:] = last
        return found

    return unit.factorised(attempt)


class _Unit:
    """A matrix `[k, k]` scaled to unit diagonal, with rows and columns in `order`, in parts."""

    def __init__(self, matrix: Tensor, damping: float, order: Tensor | None):
        self.matrix, self.order = matrix, order
        diagonal = matrix.diagonal().to(torch.float64)
        diagonal = diagonal + damping * diagonal.mean()
        diagonal = diagonal if order is None else diagonal[order]
        self.dead = diagonal <= 0
        self.root = torch.where(self.dead, 1.0, diagonal).sqrt()

    def block(self, row: int, column: int, columns: int, extra: float = 0.0) -> Tensor:
        """Rows from `row` on of some columns, float64; `extra` is added to the unit diagonal.

        Square blocks on the diagonal have as many rows as `columns`, others all there are.
        """
        right = column + columns
        stop = right if row == column else len(self.matrix)
        made = self.matrix.new_empty(stop - row, columns, dtype=torch.float64)
        for start in range(row, stop, _COPIED):
            end = min(start + _COPIED, stop)
            if self.order is None:
                rows = self.matrix[start:end, column:right]
            else:
                rows = self.matrix[self.order[start:end]][:, self.order[column:right]]
            made[start - row : end - row] = rows
        made.div_(self.root[row:stop, None]).div_(self.root[column:right])
        made[self.dead[row:stop]] = 0.0
        made[:, self.dead[column:right]] = 0.0
        if row == column:
            made.diagonal().fill_(1.0 + extra)
        return made

    def factorised(self, attempt: Callable[[float], Tensor | None]) -> Tensor:
        """The first factor that `attempt(extra)` gives, scaled back, or a ValueError."""
        for extra in _RETRIES:
            if (found := attempt(extra)) is not None:
                return found.mul_(self.root[:, None].to(found.dtype))
        if not bool(torch.isfinite(self.matrix).all()):
            raise ValueError("the Hessian holds NaN or infinity")
        size = len(self.matrix)
        raise ValueError(
            f"the {size} x {size} Hessian is not positive definite, even with "
            f"{_RETRIES[-1]:.0%} of its diagonal added: the calibration texts are too few or too "
            "much alike; give more, or none"
        )


def _factor(unit: Tensor) -> Tensor | None:
    """Lower Cholesky factor in the place of a contiguous symmetric matrix, if it has one."""
    info = torch.empty((), dtype=torch.int32, device=unit.device)
    found = unit.T  # by columns, as LAPACK wants it
    torch.linalg.cholesky_ex(found, out=(found, info))
    # NaN anywhere in a row reaches its diagonal
    if info.any() or not bool(torch.isfinite(found.diagonal()).all()):
        return None
    return found
