"""y += h·Ûᵀ from prepacked codes (prepack.py): expand for decoding.

One program makes 8 byte columns (64 outputs) of one matrix from all ranks, width after width. Warp
j of 8 takes element j of the byte columns, and SHARE such eights of warps share the ranks.
"""

import triton
import triton.language as tl

from .decode_product import lanes, multiply, over_warps, prefetch


@triton.jit
def runs_of(runs, matrix, WIDTHS: tl.constexpr):
    """Of each width 1 to 8, (first code, first slot, slots) of its ranks, in units of 16."""
    found = ()
    for b in tl.static_range(8):
        at = runs + (matrix * 8 + b) * 4
        if (WIDTHS >> (b + 1)) & 1:
            found = found + ((tl.load(at), tl.load(at + 1), tl.load(at + 2)),)
        else:
            found = found + ((0, 0, 0),)
    return found


@triton.jit(do_not_specialize=["rows", "total", "m0", "m1", "m2"])
def decode_expand_kernel(
    h,  # [rows, 16·total] of y's dtype
    y0,  # [rows, m] of each matrix
    y1,
    y2,
    runs,  # int32 [matrices, 8, 4], see `runs_of`
    codes,  # uint8, prepacked
    rows,
    total,
    m0,
    m1,
    m2,
    ADD: tl.constexpr,  # add to what y holds
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before its predecessor ended: fetch codes, then wait for h
    PREFETCH: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    tile = tl.program_id(0)
    matrix, y, length = 0, y0, m0
    if tile >= (m0 + 63) // 64:
        tile -= (m0 + 63) // 64
        matrix, y, length = 1, y1, m1
        if tile >= (m1 + 63) // 64:
            tile -= (m1 + 63) // 64
            matrix, y, length = 2, y2, m2
    columns = (length + 7) // 8
    warp, g, t = lanes(8 * SHARE)
    j = warp // SHARE
    token = tl.program_id(1) * TOKENS + g
    words = tl.pointer_type(tl.int32)
    found = runs_of(runs, matrix, WIDTHS)
    if PREFETCH:
        for b in tl.static_range(1, 9):
            if (WIDTHS >> b) & 1:
                first, slot, size = found[b - 1]
                here = tl.minimum(8, columns - tile * 8) * size * 16
                at = codes + first.to(tl.int64) * 16 + tile * 8 * size * 16
                prefetch(at, columns * size * 16, here, b, 8 * SHARE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    column = tl.minimum(tile * 8 + g, columns - 1)  # past the end: any codes
    sums = ()
    for i in tl.static_range(TOKENS):
        value = tl.zeros(g.shape, tl.float32)
        if ADD and i % 8 < 2:
            output = (tile * 8 + 2 * t + i % 8) * 8 + j
            to = y + (token + i // 8 * 8).to(tl.int64) * length + output
            live = (output < length) & (token + i // 8 * 8 < rows) & (warp % SHARE == 0)
            value = tl.load(to, mask=live, other=0.0).to(tl.float32)
        sums = sums + (value,)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            first, slot, size = found[b - 1]
            at = codes.to(words) + first.to(tl.int64) * 4 + column * size * 4
            inputs = h.to(words) + token * total * 8 + slot * 8
            sums = multiply(
                sums, at, columns * size * 4, inputs, 8 * total * 8, j, warp % SHARE * 4 + t, size,
                token, rows, b, y.dtype.element_ty, TOKENS, 4 * SHARE,
                UNROLL, PTX,
            )  # fmt: skip
    sums = over_warps(sums, TOKENS, SHARE)
    j, g, t = lanes(8)
    token = tl.program_id(1) * TOKENS + g
    for i in tl.static_range(TOKENS // 4):
        output = (tile * 8 + 2 * t + i % 2) * 8 + j
        to = y + (token + i // 2 * 8).to(tl.int64) * length + output
        live = (output < length) & (token + i // 2 * 8 < rows)
        tl.store(to, sums[i].to(y.dtype.element_ty), mask=live)
