"""y = x·Wᵀ + h·Ûᵀ of up to 16 rows in one launch for all matrices that read one input.

One program makes 8 neighbouring outputs, the elements of one byte column of U: first of the base
weights, while shrink may still be running, then of all ranks. Its warps share inputs and ranks, and
their sums are added in one order.
"""

import triton
import triton.language as tl

from .decode_expand import runs_of
from .decode_product import four, lanes, mma, multiply, no_sums, over_warps, prefetch, together


@triton.jit
def base_product(
    sums,
    weights,  # int32 pointers: the row of output g
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
            rows = rows + (four(weights + at * 4, inside),)
            some = (four(x + at * 4, inside & (token < tokens)),)
            if TOKENS == 16:
                some = some + (four(x + eighth + at * 4, inside & (token + 8 < tokens)),)
            given = given + (some,)
            loads = loads + some + (rows[u],)
        for u in tl.static_range(UNROLL):
            b = rows[u]
            if UNROLL > 1 and u == 0:
                b = (together(b[0], loads, tokens), b[1], b[2], b[3])
            sums = mma(sums, given[u], b, dtype, TOKENS, PTX)
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
    DELTA: tl.constexpr,  # False: the base product alone
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before shrink ended: wait for h
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,  # of the base product
):
    column = tl.program_id(0)
    matrix, w, y, length = 0, w0, y0, m0
    if column >= (m0 + 7) // 8:
        column -= (m0 + 7) // 8
        matrix, w, y, length = 1, w1, y1, m1
        if column >= (m1 + 7) // 8:
            column -= (m1 + 7) // 8
            matrix, w, y, length = 2, w2, y2, m2
    columns = (length + 7) // 8
    warp, g, t = lanes(WARPS)
    words = tl.pointer_type(tl.int32)
    dtype: tl.constexpr = x.dtype.element_ty
    output = tl.minimum(column * 8 + g, length - 1)  # past the end: any weights
    if DELTA:
        found = runs_of(runs, matrix, WIDTHS)
    if DELTA and PTX:
        for b in tl.static_range(1, 9):
            if (WIDTHS >> b) & 1:
                first, slot, size = found[b - 1]
                at = codes + first.to(tl.int64) * 16 + column * size * 16
                prefetch(at, columns * size * 16, size * 16, b, WARPS)
    # a warp reads 64·UNROLL neighbouring bytes of each row
    sums = base_product(
        no_sums(g, TOKENS), w.to(words) + output.to(tl.int64) * (units * 4),
        x.to(words) + g * stride * 4, 8 * stride * 4, warp * (4 * UNROLL) + t, units,
        g, rows, dtype, TOKENS, WARPS, UNROLL, PTX,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    if DELTA:
        for b in tl.static_range(1, 9):
            if (WIDTHS >> b) & 1:
                first, slot, size = found[b - 1]
                sums = multiply(
                    sums, codes.to(words) + first.to(tl.int64) * 4 + (g * 0 + column) * size * 4,
                    columns * size * 4, h.to(words) + g * total * 8 + slot * 8, 8 * total * 8, g,
                    warp * 4 + t, size, g, rows, b, dtype, TOKENS, 4 * WARPS, 1,
                    PTX,
                )  # fmt: skip
    sums = over_warps(sums, TOKENS, WARPS)
    _, g, t = lanes(1)
    for i in tl.static_range(TOKENS // 4):
        output = column * 8 + 2 * t + i % 2
        token = g + i // 2 * 8
        live = (output < length) & (token < rows)
        tl.store(y + token * length + output, sums[i].to(y.dtype.element_ty), mask=live)
