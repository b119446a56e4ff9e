"""Products with a packed delta by dequantized factors and `torch.mm`, whatever its form and dtype.

What decodes few rows without unpacking anything is in decode_plan.py. Kernels run on the device of
their tensors, whatever the current one is: Triton itself launches on the current device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .config import config
from .dequantize import dequantize_kernel
from .layout import Runs, canonical, padded_rank, rank_count, tile_table, widths_mask
from .prepack import cdiv

INTERPRETED = triton.knobs.runtime.interpret
V, U = 0, 1
CHUNK = 8192  # rows of h at a time: h of all rows would be as large as the outputs


class Packed(NamedTuple):
    """The packed delta of one [m, n] matrix; the tensors are those of the file format."""

    v: Tensor
    u: Tensor
    ranks: Tensor
    zeros: Tensor | None
    runs: Runs
    m: int
    n: int
    group_sizes: tuple[int, int]  # elements of V and of U that share a scale; 0: all

    @property
    def rank(self) -> int:
        return rank_count(self.runs)

    def codes(self, side: int) -> Tensor:
        return self.u if side == U else self.v

    def length(self, side: int) -> int:
        return self.m if side == U else self.n

    def scale_column(self, side: int) -> int:
        """Where this side's scales begin in `ranks`."""
        if side == V:
            return 1
        size = self.group_sizes[V]
        return 1 + (cdiv(self.n, size) if size else 1)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    first: Tensor,
    *args: Any,
    dependent: bool = False,
    **options: Any,
) -> None:
    """Launch on the device of `first`, the kernel's first argument.

    `dependent`: before the preceding kernel of the stream ends.
    """
    if dependent:
        options["launch_pdl"] = True
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](first, *args, **options)


def supported(group_sizes: tuple[int, int]) -> bool:
    """Whether the kernels know these group sizes: a block of 16 elements must lie in one group."""
    return all(size % 16 == 0 for size in group_sizes)


def low_rank(x: Tensor, packed: Packed, transposed: bool = False) -> Tensor:
    """x [..., n] -> (x·V̂ᵀ)·Ûᵀ [..., m] in x's dtype; `transposed`: [..., m] -> [..., n]."""
    enter, leave = (U, V) if transposed else (V, U)
    rows = flat(x)
    y = x.new_empty(len(rows), packed.length(leave))
    _multiply(y, rows, packed, enter, leave, add=False)
    return y.view(*x.shape[:-1], packed.length(leave))


def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
    """y [..., m] = x·weightᵀ + (x·V̂ᵀ)·Ûᵀ (+ bias).

    Above m·n/(m + n) rows the sum of the matrices takes fewer operations than two more products.
    """
    rows, (m, n) = flat(x), weight.shape
    with _no_autocast(x):
        if len(rows) > m * n // (m + n):
            right, left = (_factor(packed, side, weight.dtype) for side in (V, U))
            y = F.linear(rows, torch.addmm(weight, left.T, right), bias)
        else:
            y = F.linear(rows, weight, bias)
            _multiply(y, rows, packed, V, U, add=True)
    return y.view(*x.shape[:-1], m)


def _multiply(y: Tensor, x: Tensor, packed: Packed, enter: int, leave: int, add: bool) -> None:
    """Write or add x·V̂ᵀ·Ûᵀ to y, `CHUNK` rows at a time."""
    right, left = (_factor(packed, side, x.dtype) for side in (enter, leave))
    with _no_autocast(x):
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            torch.addmm(y[part], x[part] @ right.T, left, beta=int(add), out=y[part])


def dequantize(packed: Packed, side: int, dtype: torch.dtype) -> Tensor:
    """V̂ [k, n] or Ûᵀ [k, m] in `dtype`, scaled."""
    return _factor(packed, side, dtype)[: packed.rank]


def _factor(packed: Packed, side: int, dtype: torch.dtype) -> Tensor:
    """The same with zeros after the last rank; ranks and the stride of rows are multiples of 8."""
    length, ranks = packed.length(side), padded_rank(packed.runs)
    columns = cdiv(length, 8)
    out = packed.ranks.new_empty(ranks, 8 * columns, dtype=dtype)
    if out.numel() == 0:
        return out[:, :length]
    chosen = config(out.device)["dequantize"]
    r, c = chosen["R"], columns_at_once(chosen["C"], packed.group_sizes[side])
    tiles = tile_table(packed.runs, r, packed.ranks)
    launch(
        dequantize_kernel,
        (len(tiles), cdiv(columns, c)),
        out,
        tiles,
        packed.codes(side),
        packed.ranks,
        packed.ranks if packed.zeros is None else packed.zeros,
        length,
        columns,
        8 * columns,
        packed.ranks.shape[1],
        packed.scale_column(side),
        1 if packed.zeros is None else packed.zeros.shape[1],
        SIDE=side,
        GROUP=packed.group_sizes[side],
        GAUSSIAN=packed.zeros is None,
        WIDTHS=canonical(widths_mask(run[1 + side] for run in packed.runs)),
        ZERO_WIDTHS=_zero_widths(packed),
        R=r,
        C=c,
        num_warps=chosen["num_warps"],
    )
    return out[:, :length]


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context manager: products in x's dtype, which the ops' fakes promise."""
    return torch.autocast(x.device.type, enabled=False)


def flat(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n], its rows contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def columns_at_once(wanted: int, group_size: int) -> int:
    """Byte columns at a time, so that a block lies in one scale group."""
    if not group_size:
        return wanted
    return min(wanted, (group_size // 8) & -(group_size // 8))


def _zero_widths(packed: Packed) -> int:
    if packed.zeros is None:
        return 0
    return canonical(widths_mask(max(v, u) for _, v, u in packed.runs))
