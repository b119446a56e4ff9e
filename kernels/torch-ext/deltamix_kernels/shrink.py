"""h = x·V̂ᵀ from packed codes: the first half of the delta product.

One program unpacks a tile of ranks over a range of input columns and multiplies it with x. The
columns are split among programs because few rows and few ranks would leave most of a GPU idle; the
partial sums go to memory side by side and `expand` adds them in a fixed order, so that two runs
give the same bits (no atomics). Up to three matrices that read the same x (q/k/v, gate/up) share a
launch.
"""

import triton
import triton.language as tl

from .decode import dot, factor, whole_scales


@triton.jit
def tile_sums(
    x,  # [rows, n]
    row,  # int [M]: rows of x
    live,  # bool [M]
    tile,  # int32 [8], see layout.py
    packed,
    ranks,
    zeros,
    begin,  # byte columns begin to end
    end,
    n,
    x_stride,
    stride,
    scale_column,
    zero_columns,
    columns,
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
    """Partial sums float32 [R, M] of a rank tile times rows of x, scaled."""
    first_rank = tl.load(tile + 3)
    count = tl.load(tile + 4)
    sums = tl.zeros([R, M], tl.float32)
    for column in range(begin, end, C):
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
        element = column * 8 + tl.arange(0, 8 * C)
        at = row.to(tl.int64)[None, :] * x_stride + element[:, None]
        part = tl.load(x + at, mask=(element < n)[:, None] & live[None, :], other=0.0)
        sums = dot(value.to(part.dtype), part, sums, WIDEN)
    if GROUP == 0:
        sums *= whole_scales(ranks, first_rank, count, stride, scale_column, R)[:, None]
    return sums


@triton.jit
def shrink_kernel(
    x,  # [rows, n]
    out,  # float32 [splits, rows, total]
    tiles,  # int32 [tiles, 8], see layout.py
    packed0,
    packed1,
    packed2,
    ranks0,
    ranks1,
    ranks2,
    zeros,  # of matrix 0
    first1,  # where the ranks of matrix 1 and 2 begin in `out`
    first2,
    rows,
    n,
    total,
    x_stride,
    stride,
    scale_column,
    zero_columns,
    columns,  # byte columns of the codes; passed, so that Triton knows what divides it
    SIDE: tl.constexpr,  # 0: V, 1: U (backward)
    GROUP: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WIDTHS: tl.constexpr,
    ZERO_WIDTHS: tl.constexpr,
    SPLIT: tl.constexpr,  # byte columns of one program
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 8
    split = tl.program_id(1)
    matrix = tl.load(tile + 7)
    packed, ranks, first = packed0, ranks0, 0
    if matrix == 1:
        packed, ranks, first = packed1, ranks1, first1
    if matrix == 2:
        packed, ranks, first = packed2, ranks2, first2
    m = tl.program_id(2) * M + tl.arange(0, M)
    sums = tile_sums(
        x,
        m,
        m < rows,
        tile,
        packed,
        ranks,
        zeros,
        split * SPLIT,
        tl.minimum((split + 1) * SPLIT, columns),
        n,
        x_stride,
        stride,
        scale_column,
        zero_columns,
        columns,
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
    r = tl.arange(0, R)
    rank = first + tl.load(tile + 3) + r
    at = (split * rows + m).to(tl.int64)[None, :] * total + rank[:, None]
    tl.store(out + at, sums, mask=(r < tl.load(tile + 4))[:, None] & (m < rows)[None, :])
