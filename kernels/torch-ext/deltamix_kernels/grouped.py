"""The delta product where every row may have a delta of its own: one launch, however many.

A matrix has a table of slots, int64 [slots, 6]: the addresses of a delta's v, u, ranks and tile
table (layout.py), its number of tiles, and the address of its own bias, or 0; an empty slot is
zeros. Which rows use which slot is in
three int32 tensors: `order` [batch], the batch's rows sorted by delta, `starts` [entries + 1],
where each entry's rows begin in `order`, and `slots` [entries]. Neither the grid nor an argument
depends on which deltas these are, so a captured graph follows when their contents change.

Every program serves one entry. It walks over the entry's rank tiles and rows in the strides of the
grid, and unpacks a delta's codes once for all of the entry's rows (up to M at a time): the work
grows with the deltas in use, not with rows. Rows of no delta are neither read nor written.

Deltas have the Gaussian codebook and one scale for a vector of V.
"""

import triton
import triton.language as tl

from .decode import bfloat, code_of, cubic
from .expand import add_tiles
from .shrink import tile_sums

EVERY = tl.constexpr(0b111111110)  # a delta with a width not seen before compiles nothing
FIELDS = tl.constexpr(6)


@triton.jit
def _rows(order, begin, i, count, length):
    """Rows [M] of the flattened batch at positions `i` of an entry, and which are there.

    A row of the batch is `length` rows of the flattened one.
    """
    live = i < count
    return tl.load(order + begin + i // length, mask=live, other=0) * length + i % length, live


@triton.jit
def grouped_shrink_kernel(
    x,  # [rows, n]
    out,  # float32 [splits, rows, total]
    table,
    order,
    starts,
    slots,
    length,
    rows,
    n,
    total,  # at least every delta's rank
    splits,
    x_stride,
    stride,  # of `ranks`
    columns,
    GROUP: tl.constexpr,  # of U; V has one scale a vector
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """h = x·V̂ᵀ. Grid: tile programs, splits × row programs, entries."""
    entry = tl.program_id(2)
    split = tl.program_id(1) % splits
    begin = tl.load(starts + entry)
    count = (tl.load(starts + entry + 1) - begin) * length
    slot = table + tl.load(slots + entry) * FIELDS
    v = tl.multiple_of(tl.load(slot).to(tl.pointer_type(tl.uint8)), 16)
    ranks = tl.multiple_of(tl.load(slot + 2).to(tl.pointer_type(tl.int16)), 16)
    tiles = tl.multiple_of(tl.load(slot + 3).to(tl.pointer_type(tl.int32)), 16)
    tile_count = tl.load(slot + 4).to(tl.int32)
    r = tl.arange(0, R)
    step = tl.num_programs(1) // splits * M
    for t in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        tile = tiles + t * 8
        for start in range(tl.program_id(1) // splits * M, count, step):
            row, live = _rows(order, begin, start + tl.arange(0, M), count, length)
            sums = tile_sums(
                x,
                row,
                live,
                tile,
                v,
                ranks,
                v,
                split * SPLIT,
                tl.minimum((split + 1) * SPLIT, columns),
                n,
                x_stride,
                stride,
                1,
                1,
                columns,
                0,
                0,
                True,
                EVERY,
                0,
                WIDEN,
                M,
                R,
                C,
            )
            rank = tl.load(tile + 3) + r
            at = (split * rows + row).to(tl.int64)[None, :] * total + rank[:, None]
            tl.store(out + at, sums, mask=(r < tl.load(tile + 4))[:, None] & live[None, :])


@triton.jit
def grouped_expand_kernel(
    h,  # float32 [splits, rows, total]
    y,  # [rows, m]; holds the base's product
    bias,  # [m] of the base, which y contains
    table,
    order,
    starts,
    slots,
    length,
    rows,
    m,
    total,
    splits,
    stride,
    scale_column,
    columns,
    SIDE: tl.constexpr,  # 1: U, 0: V (embeddings)
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,  # of this side
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """y += h·Ûᵀ, and the delta's bias for the base's. Grid: columns, row programs, entries."""
    entry = tl.program_id(2)
    column = tl.program_id(0) * C
    begin = tl.load(starts + entry)
    count = (tl.load(starts + entry + 1) - begin) * length
    slot = table + tl.load(slots + entry) * FIELDS
    packed = tl.multiple_of(tl.load(slot + SIDE).to(tl.pointer_type(tl.uint8)), 16)
    ranks = tl.multiple_of(tl.load(slot + 2).to(tl.pointer_type(tl.int16)), 16)
    tiles = tl.multiple_of(tl.load(slot + 3).to(tl.pointer_type(tl.int32)), 16)
    tile_count = tl.load(slot + 4).to(tl.int32)
    output = column * 8 + tl.arange(0, 8 * C)
    for start in range(tl.program_id(1) * M, count, tl.num_programs(1) * M):
        row, live = _rows(order, begin, start + tl.arange(0, M), count, length)
        mask = live[:, None] & (output < m)[None, :]
        y_at = y + row.to(tl.int64)[:, None] * m + output[None, :]
        sums = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        sums = add_tiles(
            sums,
            h,
            row,
            live,
            tiles,
            tile_count,
            packed,
            ranks,
            packed,
            column,
            columns,
            0,
            rows,
            splits,
            total,
            stride,
            scale_column,
            1,
            y.dtype.element_ty,
            SIDE,
            GROUP,
            True,
            EVERY,
            0,
            WIDEN,
            M,
            R,
            C,
        )
        if BIAS:
            own = tl.load(slot + 5)
            if own != 0:
                own_at = own.to(tl.pointer_type(y.dtype.element_ty)) + output
                change = tl.load(own_at, mask=output < m, other=0.0).to(tl.float32)
                change -= tl.load(bias + output, mask=output < m, other=0.0).to(tl.float32)
                sums += change[None, :]
        tl.store(y_at, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def grouped_rows_kernel(
    ids,  # int64 [rows]
    out,  # float32 [rows, total]
    table,
    order,
    starts,
    slots,
    length,
    total,
    stride,
    columns,
    GROUP: tl.constexpr,  # of U
    M: tl.constexpr,
    R: tl.constexpr,
):
    """h = Û[ids], to be multiplied with V̂. Grid: tile programs, row programs, entries."""
    entry = tl.program_id(2)
    begin = tl.load(starts + entry)
    count = (tl.load(starts + entry + 1) - begin) * length
    slot = table + tl.load(slots + entry) * FIELDS
    u = tl.load(slot + 1).to(tl.pointer_type(tl.uint8))
    ranks = tl.load(slot + 2).to(tl.pointer_type(tl.int16))
    tiles = tl.multiple_of(tl.load(slot + 3).to(tl.pointer_type(tl.int32)), 16)
    tile_count = tl.load(slot + 4).to(tl.int32)
    r = tl.arange(0, R)
    for t in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        tile = tiles + t * 8
        first_row = tl.load(tile + 1)
        rank = tl.load(tile + 3) + r
        bits = tl.load(tile + 6)
        for start in range(tl.program_id(1) * M, count, tl.num_programs(1) * M):
            row, live = _rows(order, begin, start + tl.arange(0, M), count, length)
            element = tl.load(ids + row, mask=live, other=0).to(tl.int32)
            mask = (r < tl.load(tile + 4))[:, None] & live[None, :]
            value = tl.zeros([R, M], tl.float32)
            for b in tl.static_range(1, 9):
                if bits == b:
                    byte_row = (first_row + r * b)[:, None]
                    value = cubic(code_of(u, byte_row, b, element[None, :], columns, mask), b)
            group = element * 0
            if GROUP > 0:
                group = element // GROUP
            scale_at = rank.to(tl.int64)[:, None] * stride + 2 + group[None, :]
            value *= bfloat(tl.load(ranks + scale_at, mask=mask, other=0))
            at = row.to(tl.int64)[None, :] * total + rank[:, None]
            tl.store(out + at, value, mask=mask)
