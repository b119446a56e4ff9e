"""A packed factor as numbers in memory: many rows of x multiply it as a dense matrix."""

import triton
import triton.language as tl

from .decode import factor, whole_scales


@triton.jit
def dequantize_kernel(
    out,  # [ranks, out_stride]
    tiles,  # int32 [tiles, 7], see layout.py
    packed,
    ranks,
    zeros,
    length,  # elements of a vector
    columns,  # byte columns of the codes
    out_stride,
    stride,
    scale_column,
    zero_columns,
    SIDE: tl.constexpr,  # 0: V, 1: U
    GROUP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WIDTHS: tl.constexpr,
    ZERO_WIDTHS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """out[r] = the vector of rank r, with its scales; ranks of no bits are zeros.

    Grid: rank tiles, blocks of byte columns.
    """
    tile = tiles + tl.program_id(0) * 7
    column = tl.program_id(1) * C
    first_rank = tl.load(tile + 3)
    count = tl.load(tile + 4)
    bits = tl.load(tile + 5 + SIDE)
    known = tl.where(bits > 0, count, 0)
    value = factor(
        packed,
        ranks,
        zeros,
        tl.load(tile + SIDE),
        tl.load(tile + 2),
        first_rank,
        known,
        bits,
        tl.maximum(tl.load(tile + 5), tl.load(tile + 6)),
        column,
        columns,
        stride,
        scale_column,
        zero_columns,
        GROUP,
        GAUSSIAN,
        WIDTHS,
        ZERO_WIDTHS,
        R,
        C,
    )
    if GROUP == 0:
        value *= whole_scales(ranks, first_rank, known, stride, scale_column, R)[:, None]
    r = tl.arange(0, R)
    element = column * 8 + tl.arange(0, 8 * C)
    at = (first_rank + r).to(tl.int64)[:, None] * out_stride + element[None, :]
    live = (r < count)[:, None] & (element < length)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=live)
