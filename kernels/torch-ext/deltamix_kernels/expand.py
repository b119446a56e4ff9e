"""y = base + h·Ûᵀ from packed codes: the second half of the delta product.

One program makes a block of output columns: the base product x·Wᵀ (reading W is all the time there
is, and the delta rides along) or nothing; then, rank tile by rank tile, the sum of `shrink`'s
partial results times the codes of Û unpacked in registers; then the bias.
"""

import triton
import triton.language as tl

from .decode import dot, factor, whole_scales


@triton.jit
def add_tiles(
    sums,  # float32 [M, 8·C]
    h,  # float32 [splits, rows, total]
    row,  # int [M]: rows of h
    live,  # bool [M]
    tiles,
    tile_count,
    packed,
    ranks,
    zeros,
    column,  # first byte column of the block
    columns,
    first,
    rows,
    splits,
    total,
    stride,
    scale_column,
    zero_columns,
    dtype: tl.constexpr,  # of the products
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WIDTHS: tl.constexpr,
    ZERO_WIDTHS: tl.constexpr,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """sums + h·Ûᵀ over all rank tiles, for one block of output columns."""
    r = tl.arange(0, R)
    for t in range(tile_count):
        tile = tiles + t * 8
        first_rank = tl.load(tile + 3)
        count = tl.load(tile + 4)
        mask = live[:, None] & (r < count)[None, :]
        inner = tl.zeros([M, R], tl.float32)
        for split in range(splits):
            at = (split * rows + row).to(tl.int64)[:, None] * total
            at += (first + first_rank + r)[None, :]
            inner += tl.load(h + at, mask=mask, other=0.0)
        if GROUP == 0:
            inner *= whole_scales(ranks, first_rank, count, stride, scale_column, R)[None, :]
        value = factor(
            packed,
            ranks,
            zeros,
            tl.load(tile + SIDE),
            tl.load(tile + 2),
            first_rank,
            count,
            tl.load(tile + 5 + SIDE),
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
        sums = dot(inner.to(dtype), value.to(dtype), sums, WIDEN)
    return sums


@triton.jit
def expand_kernel(
    x,  # [rows, n]; read if BASE
    weight,  # [m, n]; read if BASE
    bias,  # [m]
    h,  # float32 [splits, rows, total]
    y,  # [rows, m]
    tiles,
    packed,
    ranks,
    zeros,
    tile_count,
    first,  # where this matrix's ranks begin in h
    rows,
    n,
    m,
    splits,
    total,
    x_stride,
    weight_stride,
    stride,
    scale_column,
    zero_columns,
    columns,  # byte columns of the codes; passed, so that Triton knows what divides it
    SIDE: tl.constexpr,  # 1: U, 0: V (backward)
    BASE: tl.constexpr,  # add x·weightᵀ
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WIDTHS: tl.constexpr,
    ZERO_WIDTHS: tl.constexpr,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,  # inputs of the base product at a time
):
    column = tl.program_id(0) * C
    row = tl.program_id(1) * M + tl.arange(0, M)
    output = column * 8 + tl.arange(0, 8 * C)
    live = (row < rows)[:, None] & (output < m)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * m + output[None, :]
    sums = tl.zeros([M, 8 * C], tl.float32)
    if BASE:
        for start in range(0, n, K):
            k = start + tl.arange(0, K)
            x_at = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
            part = tl.load(x_at, mask=(row < rows)[:, None] & (k < n)[None, :], other=0.0)
            w_at = weight + output.to(tl.int64)[None, :] * weight_stride + k[:, None]
            w = tl.load(w_at, mask=(output < m)[None, :] & (k < n)[:, None], other=0.0)
            sums = dot(part, w, sums, WIDEN)
    sums = add_tiles(
        sums,
        h,
        row,
        row < rows,
        tiles,
        tile_count,
        packed,
        ranks,
        zeros,
        column,
        columns,
        first,
        rows,
        splits,
        total,
        stride,
        scale_column,
        zero_columns,
        y.dtype.element_ty,
        SIDE,
        GROUP,
        GAUSSIAN,
        WIDTHS,
        ZERO_WIDTHS,
        WIDEN,
        M,
        R,
        C,
    )
    if BIAS:
        sums += tl.load(bias + output, mask=output < m, other=0.0).to(tl.float32)[None, :]
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=live)
