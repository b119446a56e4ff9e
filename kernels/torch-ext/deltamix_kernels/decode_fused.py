"""y = x·Wᵀ + h·Ûᵀ of up to 16 rows in one launch for all matrices that read one input.

One program makes COLUMNS times 8 neighbouring outputs, the elements of a byte column of U: first of
the base weights, while shrink may still be running, then of all ranks. Its warps share inputs,
those of a byte column its ranks, and their sums are added in one order.
"""

import triton
import triton.language as tl

from .decode_expand import add_ranks, prefetch_ranks, runs_of, touch_ranks
from .decode_product import (
    addresses,
    advanced,
    four,
    lanes,
    load,
    load_some,
    mma,
    mma_of_16,
    no_sums,
    no_words,
    over_warps,
    some_of,
    touch,
)


@triton.jit
def _weights(rows, ahead: tl.constexpr, COUNT: tl.constexpr, PTX: tl.constexpr):
    """Words of COUNT steps' weights of every byte column."""
    found = ()
    for u in tl.static_range(COUNT):
        for c in tl.static_range(len(rows)):
            found = found + load(rows[c], ahead + 4 * u, PTX, ONCE=True)
    return found


@triton.jit
def _inputs(x, ahead: tl.constexpr, live, before, COUNT: tl.constexpr, PTX: tl.constexpr):
    """Words of COUNT steps' inputs; of tokens that are not `live` those of `before`."""
    found = ()
    for u in tl.static_range(COUNT):
        for i in tl.static_range(len(x)):
            others = some_of(before, 4 * (u * len(x) + i), 4)
            found = found + load_some(x[i], ahead + 4 * u, live[i], others, PTX)
    return found


@triton.jit
def _add(
    sums, weights, given, COLUMNS: tl.constexpr, dtype: tl.constexpr, TOKENS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """sums + the product of `_weights` and `_inputs`."""
    blocks: tl.constexpr = TOKENS // 8
    for u in tl.static_range(len(weights) // (4 * COLUMNS)):
        done = ()
        a = some_of(given, 4 * blocks * u, 4)
        for c in tl.static_range(COLUMNS):
            b = some_of(weights, 4 * (u * COLUMNS + c), 4)
            if TOKENS == 8:
                done = done + mma(some_of(sums, 8 * c, 8), (a,), b, dtype, TOKENS, PTX)
            else:
                more = some_of(given, 8 * u + 4, 4)
                done = done + mma_of_16(some_of(sums, 4 * c, 4), a, more, b, dtype, PTX)
        sums = done
    return sums


@triton.jit
def base_product(
    weights,  # of every byte column int32 pointers: the row of output g
    x,  # of every eight tokens int32 pointers: token g
    live,  # of every eight tokens: whether it exists
    warp,
    t,
    length,  # inputs in units of 8
    dtype: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,  # steps whose weights are loaded before the first is used; even
    PTX: tl.constexpr,
):
    """The product of a thread's outputs' weights and a token: 8 sums a column, for 16 tokens 4.

    A warp reads 64·UNROLL neighbouring bytes of each row, half of them while it multiplies the
    others. Inputs of 8 tokens, which the L1 cache has, are read when they are wanted, those of 16,
    which it has no room for, with the weights.
    """
    COLUMNS: tl.constexpr = len(weights)
    half: tl.constexpr = UNROLL // 2
    step: tl.constexpr = 4 * WARPS * UNROLL
    EARLY: tl.constexpr = TOKENS == 16
    sums = no_sums(t, COLUMNS * (8 if TOKENS == 8 else 4))
    whole = length // step * step
    first = warp * (4 * UNROLL) + t
    rows, to = (), ()
    for c in tl.static_range(COLUMNS):
        rows = rows + (weights[c] + first * 4,)
    for i in tl.static_range(len(x)):
        to = to + (x[i] + first * 4,)
    rows, to = addresses(rows, PTX), addresses(to, PTX)
    given = no_words(t, 4 * half * len(x))
    later = given
    if whole > 0:
        loads = _weights(rows, 0, half, PTX)
        if EARLY:
            given = _inputs(to, 0, live, given, half, PTX)
        for start in range(step, whole + 1, step):
            others = _weights(rows, 4 * half, half, PTX)
            if EARLY:
                later = _inputs(to, 4 * half, live, later, half, PTX)
            else:
                given = _inputs(to, 0, live, given, half, PTX)
            sums = _add(sums, loads, given, COLUMNS, dtype, TOKENS, PTX)
            further = tl.where(start < whole, step, 0)  # the last ones are loaded once more
            rows = advanced(rows, further)
            loads = _weights(rows, 0, half, PTX)
            if EARLY:
                to = advanced(to, further)
                given = _inputs(to, 0, live, given, half, PTX)
            else:
                later = _inputs(to, 4 * half, live, later, half, PTX)
                to = advanced(to, step)
            sums = _add(sums, others, later, COLUMNS, dtype, TOKENS, PTX)
    for start in range(whole, length, 4 * WARPS):
        at = start + warp * 4 + t
        inside = at < length
        last, given_last = (), ()
        for c in tl.static_range(COLUMNS):
            last = last + four(weights[c] + at * 4, inside)
        for i in tl.static_range(len(x)):
            given_last = given_last + four(x[i] + at * 4, inside & live[i])
        sums = _add(sums, last, given_last, COLUMNS, dtype, TOKENS, PTX)
    return sums


@triton.jit
def _rank_product(
    h, codes, found, tile, columns, rows, total, dtype: tl.constexpr, WIDTHS: tl.constexpr,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Wait for h, then make the product of all ranks and every warp's byte column.

    Neighbouring warps have the same column and share its ranks. The few steps that follow would
    each wait for the L2 cache; so all they read is brought nearer at once (H200, one row: a layer
    in 162 instead of 169 us).
    """
    warp, g, t = lanes(WARPS)
    share: tl.constexpr = WARPS // COLUMNS
    near = touch_ranks(codes, found, tile, columns, WIDTHS, COLUMNS, WARPS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    near |= touch(h.to(tl.pointer_type(tl.uint8)), 0, rows * total * 32, 1, 1, WARPS)
    none = (near & (rows >> 31)).to(tl.float32)  # 0: rows is no negative number
    added, inputs = (none,) + no_sums(g, TOKENS - 1), ()
    for i in tl.static_range(TOKENS // 8):
        inputs = inputs + (h.to(tl.pointer_type(tl.int32)) + (g + 8 * i) * total * 8,)
    column = tl.minimum(tile * COLUMNS + warp // share, columns - 1)
    return add_ranks(
        added, codes, found, inputs, column, columns, g, warp % share * 4 + t, g, rows,
        dtype, WIDTHS, TOKENS, 4 * share, 2, PTX,
    )  # fmt: skip


@triton.jit
def _store(y, bias, sums, first, length, rows, BIASED: tl.constexpr, TOKENS: tl.constexpr):
    """Write eight outputs from `first` on of every token, with their bias."""
    _, row, pair = lanes(1)
    for i in tl.static_range(TOKENS // 4):
        output = first + 2 * pair + i % 2
        token = row + i // 2 * 8
        live = (output < length) & (token < rows)
        value = sums[i]
        if BIASED:
            value += tl.load(bias + output, mask=output < length, other=0.0).to(tl.float32)
        tl.store(y + token * length + output, value.to(y.dtype.element_ty), mask=live)


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
    if PDL:  # the next shrink may ask for its codes; it waits for the end of this
        tl.extra.cuda.gdc_launch_dependents()
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
    inputs, live = (), ()
    for i in tl.static_range(TOKENS // 8):
        inputs = inputs + (x.to(words) + (g + 8 * i) * stride * 4,)
        live = live + (g + 8 * i < rows,)
    sums = base_product(weights, inputs, live, warp, t, units, dtype, TOKENS, WARPS, UNROLL, PTX)
    share: tl.constexpr = WARPS // COLUMNS
    if DELTA:
        added = _rank_product(
            h, codes, found, tile, columns, rows, total, dtype,
            WIDTHS, TOKENS, WARPS, COLUMNS, PTX, PDL,
        )  # fmt: skip
    else:
        added = no_sums(g, TOKENS)
        if PDL:
            tl.extra.cuda.gdc_wait()
    for c in tl.static_range(COLUMNS):
        mine = ()
        for i in tl.static_range(TOKENS):
            own = added[i] if COLUMNS == 1 else tl.where(warp // share == c, added[i], 0.0)
            if TOKENS == 8:
                own += sums[c * 8 + i]
            elif i % 8 < 2:
                own += sums[c * 4 + i // 8 * 2 + i % 8]
            mine = mine + (own,)
        mine = over_warps(mine, TOKENS, WARPS)
        _store(y, bias, mine, (tile * COLUMNS + c) * 8, length, rows, BIASED, TOKENS)
