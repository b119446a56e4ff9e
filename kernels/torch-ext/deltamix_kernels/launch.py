"""Host side: choose tiles, allocate outputs, launch.

Few rows of x take `shrink` and `expand`, which read packed codes only. Above `DECODE_ROWS`, both
factors are dequantized once and multiplied by `torch.mm`. Kernels run on the device of their
tensors, whatever the current one is: Triton itself launches on the current device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .config import DECODE_ROWS, config
from .dequantize import dequantize_kernel
from .expand import expand_kernel
from .layout import Runs, rank_count, tile_table, widths_mask
from .shrink import shrink_kernel

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
        return 1 + (-(-self.n // size) if size else 1)

    @property
    def groupable(self) -> bool:
        """May share a shrink launch: one scale a vector, no zero points."""
        return self.zeros is None and self.group_sizes[V] == 0


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device of `first`, the kernel's first argument."""
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](first, *args, **options)


def supported(group_sizes: tuple[int, int]) -> bool:
    """Whether the kernels know these group sizes: a block of 16 elements must lie in one group."""
    return all(size % 16 == 0 for size in group_sizes)


def split_columns(
    device: torch.device, rows: int, n: int, group_size: int = 0, kernel: str = "shrink"
) -> tuple[int, int]:
    """Byte columns of one program of `shrink`, and how many programs share a tile's columns.

    The latter is the first dimension of `shrink`'s sums: 1 where rows are many.
    """
    if kernel == "shrink" and rows > DECODE_ROWS:
        return triton.cdiv(n, 8), 1
    chosen = config(device, rows, kernel)
    c = columns_at_once(chosen["C"], group_size)
    columns = triton.cdiv(n, 8)
    split = triton.cdiv(triton.cdiv(columns, chosen["splits"]), c) * c
    return split, max(1, triton.cdiv(columns, split))


def shrink(x: Tensor, matrices: Sequence[Packed], side: int = V) -> Tensor:
    """Partial sums float32 [splits, rows, ranks of all matrices] of x [..., n] times V̂ᵀ.

    `side=U` multiplies with Û's codes instead (x is [rows, m]). Several matrices must read the same
    x and be `groupable`.
    """
    one = matrices[0]
    if len(matrices) > 1 and not all(p.groupable and p.n == one.n for p in matrices):
        raise ValueError("only matrices of one input and one scale a vector share a launch")
    if len(matrices) > 3:
        raise ValueError(f"at most three matrices share a launch, got {len(matrices)}")
    x = flat(x)
    rows, n = x.shape
    assert n == one.length(side)
    if rows > DECODE_ROWS:
        with _no_autocast(x):
            parts = [x @ dequantize(p, side, x.dtype).T for p in matrices]
        return torch.cat(parts, 1).float()[None]
    chosen = config(x.device, rows, "shrink")
    r, c, m = chosen["R"], columns_at_once(chosen["C"], one.group_sizes[side]), chosen["M"]
    tiles = tile_table(tuple(p.runs for p in matrices), r, x.device)
    ranks = [p.rank for p in matrices]
    columns = triton.cdiv(n, 8)
    split, splits = split_columns(x.device, rows, n, one.group_sizes[side])
    out = x.new_empty(splits, rows, sum(ranks), dtype=torch.float32)
    if out.numel() == 0:
        return out
    full = [*matrices, one, one][:3]
    launch(
        shrink_kernel,
        (len(tiles), splits, triton.cdiv(rows, m)),
        x,
        out,
        tiles,
        *(p.codes(side) for p in full),
        *(p.ranks for p in full),
        one.ranks if one.zeros is None else one.zeros,
        ranks[0],
        sum(ranks[:2]),
        rows,
        n,
        sum(ranks),
        x.stride(0),
        one.ranks.shape[1],
        one.scale_column(side),
        1 if one.zeros is None else one.zeros.shape[1],
        columns,
        SIDE=side,
        GROUP=one.group_sizes[side],
        GAUSSIAN=one.zeros is None,
        WIDTHS=widths_mask(run[1 + side] for p in matrices for run in p.runs),
        ZERO_WIDTHS=_zero_widths(one),
        SPLIT=split,
        WIDEN=INTERPRETED,
        M=m,
        R=r,
        C=c,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    return out


def expand(
    h: Tensor,
    packed: Packed,
    dtype: torch.dtype,
    side: int = U,
    *,
    first: int = 0,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y [rows, m] = base + h·Ûᵀ (+ bias), the base x·weightᵀ or nothing; few rows.

    `h` are `shrink`'s partial sums; this matrix's ranks begin at column `first`.
    """
    splits, rows, total = h.shape
    m = packed.length(side)
    chosen = config(h.device, rows, "expand")
    r, c, block = chosen["R"], columns_at_once(chosen["C"], packed.group_sizes[side]), chosen["M"]
    y = h.new_empty(rows, m, dtype=dtype)
    if y.numel() == 0:
        return y
    tiles = tile_table((packed.runs,), r, h.device)
    columns = triton.cdiv(m, 8)
    source, matrix = (y, y) if x is None or weight is None else (x, weight)
    launch(
        expand_kernel,
        (triton.cdiv(columns, c), triton.cdiv(rows, block)),
        source,
        matrix,
        y if bias is None else bias,
        h,
        y,
        tiles,
        packed.codes(side),
        packed.ranks,
        packed.ranks if packed.zeros is None else packed.zeros,
        len(tiles),
        first,
        rows,
        source.shape[1],
        m,
        splits,
        total,
        source.stride(0),
        matrix.stride(0),
        packed.ranks.shape[1],
        packed.scale_column(side),
        1 if packed.zeros is None else packed.zeros.shape[1],
        columns,
        SIDE=side,
        BASE=weight is not None,
        BIAS=bias is not None,
        GROUP=packed.group_sizes[side],
        GAUSSIAN=packed.zeros is None,
        WIDTHS=widths_mask(run[1 + side] for run in packed.runs),
        ZERO_WIDTHS=_zero_widths(packed),
        WIDEN=INTERPRETED,
        M=block,
        R=r,
        C=c,
        K=chosen["K"],
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    return y


def low_rank(x: Tensor, packed: Packed, transposed: bool = False) -> Tensor:
    """x [..., n] -> (x·V̂ᵀ)·Ûᵀ [..., m] in x's dtype; `transposed`: [..., m] -> [..., n]."""
    enter, leave = (U, V) if transposed else (V, U)
    rows = flat(x)
    if len(rows) > DECODE_ROWS:
        y = x.new_empty(len(rows), packed.length(leave))
        for part, h, factor in _chunks(rows, packed, enter, leave):
            torch.mm(h, factor, out=y[part])
    else:
        y = expand(shrink(rows, [packed], enter), packed, x.dtype, leave)
    return y.view(*x.shape[:-1], packed.length(leave))


def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
    """y [..., m] = x·weightᵀ + (x·V̂ᵀ)·Ûᵀ (+ bias)."""
    rows = flat(x)
    if len(rows) > DECODE_ROWS:
        with _no_autocast(x):
            y = F.linear(rows, weight, bias)
        for part, h, factor in _chunks(rows, packed, V, U):
            y[part].addmm_(h, factor)
    else:
        y = finish_linear(rows, weight, bias, shrink(rows, [packed]), packed)
    return y.view(*x.shape[:-1], packed.m)


def finish_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, packed: Packed, first: int = 0
) -> Tensor:
    """The rest of `delta_linear`, [rows, m], of x [..., n] and h; few rows: with the base."""
    x = flat(x)
    if len(x) <= DECODE_ROWS:
        return expand(h, packed, x.dtype, first=first, x=x, weight=weight, bias=bias)
    inner = h[0, :, first : first + packed.rank].to(x.dtype)
    with _no_autocast(x):
        return F.linear(x, weight, bias).addmm_(inner, dequantize(packed, U, x.dtype))


def dequantize(packed: Packed, side: int, dtype: torch.dtype) -> Tensor:
    """V̂ [k, n] or Ûᵀ [k, m] in `dtype`, scaled. Rows begin at multiples of 8 elements.

    cuBLAS multiplies rows that begin anywhere by its slow kernels.
    """
    length = packed.length(side)
    columns = triton.cdiv(length, 8)
    out = packed.ranks.new_empty(packed.rank, 8 * columns, dtype=dtype)
    if out.numel() == 0:
        return out[:, :length]
    chosen = config(out.device, DECODE_ROWS + 1, "dequantize")
    r, c = chosen["R"], columns_at_once(chosen["C"], packed.group_sizes[side])
    tiles = tile_table((packed.runs,), r, out.device)
    launch(
        dequantize_kernel,
        (len(tiles), triton.cdiv(columns, c)),
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
        WIDTHS=widths_mask(run[1 + side] for run in packed.runs),
        ZERO_WIDTHS=_zero_widths(packed),
        R=r,
        C=c,
        num_warps=chosen["num_warps"],
    )
    return out[:, :length]


def _chunks(
    x: Tensor, packed: Packed, enter: int, leave: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their h = x·V̂ᵀ, Ûᵀ) of up to `CHUNK` rows of x [rows, n] at a time."""
    right, left = dequantize(packed, enter, x.dtype), dequantize(packed, leave, x.dtype)
    with _no_autocast(x):
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            yield part, x[part] @ right.T, left


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
    return widths_mask(max(v, u) for _, v, u in packed.runs)
