"""y = x·Wᵀ + h·Ûᵀ of up to 16 rows in one launch for all matrices that read one input.

One program makes COLUMNS times 8 neighbouring outputs, the elements of a byte column of U: first of
the base weights, while shrink may still be running, then of all ranks. Its warps share inputs,
those of a byte column its ranks, and their sums are added in one order.
"""

import triton
import triton.language as tl

from .decode_expand import add_ranks, prefetch_ranks, runs_of
from .decode_product import (
    four,
    lanes,
    mma,
    no_sums,
    over_warps,
    some_of,
    together,
)


@triton.jit
def base_product(
    sums,
    weights,  # of every byte column int32 pointers: the row of output g
    x,  # int32 pointers: token g
    eighth,
    first,
    length,  # inputs in units of 8
    token,
    tokens,
    dtype: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
):
    """sums + the product of a thread's output's weights and a token."""
    for start in range(0, length, 4 * WARPS * UNROLL):
        rows, given, loads = (), (), ()
        for u in tl.static_range(UNROLL):
            at = start + u * 4 + first
            inside = at < length
            for c in tl.static_range(len(weights)):
                rows = rows + (four(weights[c] + at * 4, inside, True),)
                loads = loads + (rows[u * len(weights) + c],)
            some = (four(x + at * 4, inside & (token < tokens)),)
            if TOKENS == 16:
                some = some + (four(x + eighth + at * 4, inside & (token + 8 < tokens)),)
            given = given + (some,)
            loads = loads + some
        for u in tl.static_range(UNROLL):
            done = ()
            for c in tl.static_range(len(weights)):
                b = rows[u * len(weights) + c]
                if UNROLL > 1 and u + c == 0:
                    b = (together(b[0], loads, tokens), b[1], b[2], b[3])
                done = done + mma(
                    some_of(sums, c * TOKENS, TOKENS), given[u], b, dtype, TOKENS, PTX
                )
            sums = done
    return sums


@triton.jit(do_not_specialize=["rows", "stride", "units", "total", "m0", "m1", "m2"])
def decode_fused_kernel(
    x,  # [rows, 8·units], rows of `stride` 16 bytes, aligned
    w0,  # [m, 8·units] of each matrix
    w1,
    w2,
    h,  # [rows, 16·total] of y's dtype
    y0,  # [rows, m] of each matrix
    y1,
    y2,
    runs,  # int32 [matrices, 8, 4], see `runs_of`
    codes,  # uint8, prepacked
    rows,
    stride,
    units,
    total,
    m0,
    m1,
    m2,
    b0,  # [m] of each matrix
    b1,
    b2,
    BIASED: tl.constexpr,
    DELTA: tl.constexpr,  # False: the base product alone
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before shrink ended: wait for h
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,  # of the base product
):
    tile = tl.program_id(0)
    outputs: tl.constexpr = 8 * COLUMNS
    w, y, bias, length = w0, y0, b0, m0
    if tile >= (m0 + outputs - 1) // outputs:
        tile -= (m0 + outputs - 1) // outputs
        runs += 32
        w, y, bias, length = w1, y1, b1, m1
        if tile >= (m1 + outputs - 1) // outputs:
            tile -= (m1 + outputs - 1) // outputs
            runs += 32
            w, y, bias, length = w2, y2, b2, m2
    columns = (length + 7) // 8
    warp, g, t = lanes(WARPS)
    words = tl.pointer_type(tl.int32)
    dtype: tl.constexpr = x.dtype.element_ty
    if DELTA:
        found = runs_of(runs, True, WIDTHS)
    if DELTA and PTX:
        prefetch_ranks(codes, found, tile, columns, WIDTHS, COLUMNS, WARPS)
    weights = ()
    for c in tl.static_range(COLUMNS):
        output = tl.minimum(tile * outputs + c * 8 + g, length - 1)  # past the end: any weights
        weights = weights + (w.to(words) + output.to(tl.int64) * (units * 4),)
    # a warp reads 64·UNROLL neighbouring bytes of each row
    sums = base_product(
        no_sums(g, COLUMNS * TOKENS), weights, x.to(words) + g * stride * 4, 8 * stride * 4,
        warp * (4 * UNROLL) + t, units, g, rows, dtype, TOKENS, WARPS, UNROLL, PTX,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    share: tl.constexpr = WARPS // COLUMNS
    # Of byte column warp // share, whose ranks that many warps share.
    added = no_sums(g, TOKENS)
    if DELTA:
        column = tl.minimum(tile * COLUMNS + warp // share, columns - 1)
        inputs = ()
        for i in tl.static_range(TOKENS // 8):
            inputs = inputs + (h.to(words) + (g + 8 * i) * total * 8,)
        added = add_ranks(
            added, codes, found, inputs, column, columns, g, warp % share * 4 + t, g, rows,
            dtype, WIDTHS, TOKENS, 4 * share, 1, PTX,
        )  # fmt: skip
    _, row, pair = lanes(1)
    for c in tl.static_range(COLUMNS):
        mine = ()
        for i in tl.static_range(TOKENS):
            own = added[i] if COLUMNS == 1 else tl.where(warp // share == c, added[i], 0.0)
            mine = mine + (sums[c * TOKENS + i] + own,)
        mine = over_warps(mine, TOKENS, WARPS)
        for i in tl.static_range(TOKENS // 4):
            output = tile * outputs + c * 8 + 2 * pair + i % 2
            token = row + i // 2 * 8
            live = (output < length) & (token < rows)
            value = mine[i]
            if BIASED:
                value += tl.load(bias + output, mask=output < length, other=0.0).to(tl.float32)
            tl.store(y + token * length + output, value.to(y.dtype.element_ty), mask=live)
