"""Decoding where every row may have a delta of its own: one launch, however many deltas.

A matrix has a table of slots, int64 [slots, 8]: the addresses of a delta's prepacked V and U, its
tiles and their number, its runs, slots of h and scales (decode_plan.py), and the address of its own
bias, or 0; an empty slot is zeros. Which rows use which slot is in three int32 tensors: `order`
[batch], the batch's rows sorted by delta, `starts` [entries + 1], where each entry's rows begin in
`order`, and `slots` [entries]. Neither the grid nor an argument depends on which deltas these are,
so a captured graph follows when their contents change.

A row of the batch is `length` rows of x. Position p, of the rows sorted by delta, is row p % length
of row `order[p // length]`; a launch makes the positions `low` to `high`, h is in their order.
The programs, as many as the device runs at a time, share a list of work that each finds in these
tables: it grows with the deltas in use, and rows of none are neither read nor written.
"""

import triton
import triton.language as tl

from .decode import bfloat, code_of, cubic
from .decode_expand import expand_tile
from .decode_product import lanes
from .decode_shrink import shrink_tile

FIELDS = tl.constexpr(8)
V, U, TILES, TILE_COUNT, RUNS, SLOTS, SCALES, BIAS = (tl.constexpr(i) for i in range(8))


@triton.jit
def _work(
    starts, slots, table, length, low, high, entries, TOKENS: tl.constexpr, MOST: tl.constexpr
):
    """(first entry with rows, entries up to the last, most tiles of one, most blocks of rows)."""
    e = tl.arange(0, MOST)
    known = e < entries
    begin = tl.maximum(tl.load(starts + e, mask=known, other=0) * length, low)
    end = tl.minimum(tl.load(starts + e + 1, mask=known, other=0) * length, high)
    rows = tl.where(known, end - begin, 0)
    used = rows > 0
    slot = tl.load(slots + e, mask=used, other=0)
    count = tl.load(table + slot * FIELDS + TILE_COUNT, mask=used, other=0).to(tl.int32)
    first = tl.min(tl.where(used, e, MOST))
    past = tl.max(tl.where(used, e + 1, 0))
    blocks = (tl.max(rows) + TOKENS - 1) // TOKENS
    return first, tl.maximum(past - first, 0), tl.max(count), blocks


@triton.jit
def _entry(starts, slots, table, entry, length, low, high):
    """(first position, position past the last, slot's fields) of an entry."""
    begin = tl.maximum(tl.load(starts + entry) * length, low)
    end = tl.minimum(tl.load(starts + entry + 1) * length, high)
    return begin, end, table + tl.load(slots + entry) * FIELDS


@triton.jit
def _tensor(fields, number: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(fields + number).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _rows(order, first, length, end, TOKENS: tl.constexpr):
    """Of every eight positions from `first` on, the row of x of each thread's position."""
    _, g, _ = lanes(8)
    found = ()
    for i in tl.static_range(TOKENS // 8):
        p = first + 8 * i + g
        row = tl.load(order + p // length, mask=p < end, other=0)
        found = found + (row.to(tl.int64) * length + p % length,)
    return found


@triton.jit(do_not_specialize=["length", "low", "high", "entries", "stride", "total", "units"])
def grouped_shrink_kernel(
    x,  # [rows, 128·units] 16-bit floats, rows of `stride` 16 bytes, aligned
    h,  # [high - low, 16·total] of x's dtype
    table,
    order,
    starts,
    slots,
    length,
    low,
    high,
    entries,
    stride,
    total,  # slots of h in units of 16: at least every delta's
    units,
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # let a dependent launch start at once
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
    MOST: tl.constexpr,  # entries, a power of two
):
    """h = x·V̂ᵀ. Grid: any."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first_entry, used, tiles, blocks = _work(
        starts, slots, table, length, low, high, entries, TOKENS, MOST
    )
    h -= low.to(tl.int64) * total * 16
    for item in range(tl.program_id(0), used * tiles * blocks, tl.num_programs(0)):
        entry, tile = first_entry + item // (tiles * blocks), item // blocks % tiles
        begin, end, fields = _entry(starts, slots, table, entry, length, low, high)
        first = begin + item % blocks * TOKENS
        if (first < end) & (tile < tl.load(fields + TILE_COUNT)):
            rows, inputs = _rows(order, first, length, end, TOKENS), ()
            for i in tl.static_range(TOKENS // 8):
                inputs = inputs + (x.to(tl.pointer_type(tl.int32)) + rows[i] * stride * 4,)
            shrink_tile(
                inputs, h, _tensor(fields, TILES, tl.int32) + tile * 4,
                _tensor(fields, V, tl.uint8), _tensor(fields, SLOTS, tl.int32),
                _tensor(fields, SCALES, tl.float32), first, end, total, units,
                x.dtype.element_ty, WIDTHS, PTX, False, TOKENS, UNROLL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["length", "low", "high", "entries", "m", "total"])
def grouped_expand_kernel(
    h,  # [high - low, 16·total] of y's dtype
    y,  # [rows, m]; holds the base's product
    bias,  # [m] of the base, which y contains
    table,
    order,
    starts,
    slots,
    length,
    low,
    high,
    entries,
    m,
    total,
    BIASED: tl.constexpr,
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before shrink ended: ask for codes, then wait for h
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
    MOST: tl.constexpr,
):
    """y += h·Ûᵀ, and the delta's bias for the base's. Grid: any."""
    first_entry, used, _, blocks = _work(
        starts, slots, table, length, low, high, entries, TOKENS, MOST
    )
    words = tl.pointer_type(tl.int32)
    j, g, t = lanes(8)
    tiles = (m + 63) // 64
    for item in range(tl.program_id(0), used * tiles * blocks, tl.num_programs(0)):
        entry, tile = first_entry + item // (tiles * blocks), item // blocks % tiles
        begin, end, fields = _entry(starts, slots, table, entry, length, low, high)
        first = begin + item % blocks * TOKENS
        if first < end:
            runs, known = _tensor(fields, RUNS, tl.int32), tl.load(fields + RUNS) != 0
            none = tl.zeros(g.shape, tl.float32)
            change = (none, none)
            if BIASED:
                own = tl.load(fields + BIAS)
                has = g * 0 + own != 0
                found = ()
                for i in tl.static_range(2):
                    output = (tile * 8 + 2 * t + i) * 8 + j
                    live = has & (output < m)
                    at = own.to(tl.pointer_type(y.dtype.element_ty)) + output
                    more = tl.load(at, mask=live, other=0.0).to(tl.float32)
                    less = tl.load(bias + output, mask=live, other=0.0).to(tl.float32)
                    found = found + (more - less,)
                change = found
            rows, inputs, outputs = _rows(order, first, length, end, TOKENS), (), ()
            for i in tl.static_range(TOKENS // 8):
                token = (first - low + 8 * i + g).to(tl.int64)
                inputs = inputs + (h.to(words) + token * total * 8,)
                outputs = outputs + (y + rows[i] * m,)
            expand_tile(
                outputs, change, inputs, runs, known, _tensor(fields, U, tl.uint8), tile, m, first,
                end, h.dtype.element_ty, True, WIDTHS, PTX, PDL, TOKENS, UNROLL,
            )  # fmt: skip
    if PDL:  # whoever comes after this has waited for shrink and those before it
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["length", "low", "high", "entries", "stride", "columns", "total"])
def grouped_rows_kernel(
    ids,  # int64 [rows]
    h,  # [high - low, 16·total] of y's dtype
    table,
    order,
    starts,
    slots,
    length,
    low,
    high,
    entries,
    stride,  # of `ranks`
    columns,  # byte columns of U
    total,
    GROUP: tl.constexpr,  # elements of U that share a scale; 0: all
    WIDTHS: tl.constexpr,
    R: tl.constexpr,
    MOST: tl.constexpr,
):
    """h = Û[ids], scales of both sides included. Grid: any.

    Of an embedding, where V takes the place that U has elsewhere: U's codes are as stored, SCALES
    are the int16 ranks and TILES is int32 [ranks, 3], each rank's first byte row, width and slot;
    a width of 0 marks slots of no rank.
    """
    first_entry, used, most, rows = _work(starts, slots, table, length, low, high, entries, 1, MOST)
    tiles = (most + R - 1) // R
    for item in range(tl.program_id(0), used * tiles * rows, tl.num_programs(0)):
        entry, tile = first_entry + item // (tiles * rows), item // rows % tiles
        begin, end, fields = _entry(starts, slots, table, entry, length, low, high)
        p = begin + item % rows
        if p < end:
            codes, ranks = _tensor(fields, V, tl.uint8), _tensor(fields, SCALES, tl.int16)
            places = _tensor(fields, TILES, tl.int32)
            r = tile * R + tl.arange(0, R)
            live = r < tl.load(fields + TILE_COUNT)
            row = tl.load(places + r * 3, mask=live, other=0)
            bits = tl.load(places + r * 3 + 1, mask=live, other=0)
            slot = tl.load(places + r * 3 + 2, mask=live, other=0)
            ranked = bits > 0  # other slots get zeros
            scale_at = ranks + r.to(tl.int64) * stride
            v_scale = bfloat(tl.load(scale_at + 1, mask=ranked, other=0))
            at = tl.load(order + p // length).to(tl.int64) * length + p % length
            element = tl.load(ids + at).to(tl.int32)
            value = tl.zeros([R], tl.float32)
            for b in tl.static_range(1, 9):
                if (WIDTHS >> b) & 1:
                    found = cubic(code_of(codes, row, b, element, columns, bits == b), b)
                    value = tl.where(bits == b, found, value)
            group = 0
            if GROUP > 0:
                group = element // GROUP
            value *= v_scale * bfloat(tl.load(scale_at + 2 + group, mask=ranked, other=0))
            to = h + (p - low).to(tl.int64) * total * 16 + slot
            tl.store(to, value.to(h.dtype.element_ty), mask=live)
