"""h = x·V̂ᵀ from prepacked codes (prepack.py): shrink for decoding.

One program multiplies 8 ranks of one width with all inputs. Warp j of 8 takes element j of the byte
columns, whose inputs lie at j·columns + byte column, and SHARE such eights of warps share the byte
columns. The warps' sums are added in one order, so that two runs give the same bits.
"""

import triton
import triton.language as tl

from .decode_product import lanes, multiply, no_sums, over_warps, prefetch


@triton.jit(do_not_specialize=["rows", "stride", "total", "units"])
def decode_shrink_kernel(
    x,  # [rows, 128·units] 16-bit floats, rows of `stride` 16 bytes, aligned
    h,  # [rows, 16·total] of x's dtype
    tiles,  # int32 [tiles, 4]: first code, first rank, ranks, bits; codes in units of 16 bytes
    codes,  # uint8, prepacked
    slots,  # int32 [ranks]: where each rank lies in h
    scales,  # float32 [ranks]
    rows,
    stride,
    total,
    units,  # byte columns in units of 16
    WIDTHS: tl.constexpr,  # bit b: some tile has width b
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # let a dependent launch start at once
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * 4
    begin, rank = tl.load(tile), tl.load(tile + 1)
    count, bits = tl.load(tile + 2), tl.load(tile + 3)
    warp, g, t = lanes(8 * SHARE)
    j = warp // SHARE
    token = tl.program_id(1) * TOKENS + g
    words = tl.pointer_type(tl.int32)
    if PTX:
        size = bits * units * 16
        for start in range(0, size, 512 * 8 * SHARE):
            prefetch(codes + begin.to(tl.int64) * 16 + start, size, size - start, count, 8 * SHARE)
    _, row, pair = lanes(1)
    column = 2 * pair
    slot0 = tl.load(slots + rank + column, mask=column < count, other=0)
    slot1 = tl.load(slots + rank + column + 1, mask=column + 1 < count, other=0)
    scale0 = tl.load(scales + rank + column, mask=column < count, other=0.0)
    scale1 = tl.load(scales + rank + column + 1, mask=column + 1 < count, other=0.0)
    # past the last rank: any codes
    at = codes.to(words) + begin.to(tl.int64) * 4 + tl.minimum(g, count - 1) * bits * units * 4
    inputs = x.to(words) + token * stride * 4 + j * units * 8
    sums = no_sums(g, TOKENS)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            if bits == b:
                sums = multiply(
                    sums, at, units * 4, inputs, 8 * stride * 4, j, warp % SHARE * 4 + t, units,
                    token, rows, b, x.dtype.element_ty, TOKENS, 4 * SHARE,
                    UNROLL, PTX,
                )  # fmt: skip
    sums = over_warps(sums, TOKENS, 8 * SHARE)
    for i in tl.static_range(TOKENS // 8):
        token = tl.program_id(1) * TOKENS + i * 8 + row
        to = h + token * total * 16
        mask = (column < count) & (token < rows)
        tl.store(to + slot0, (sums[2 * i] * scale0).to(h.dtype.element_ty), mask=mask)
        mask = (column + 1 < count) & (token < rows)
        tl.store(to + slot1, (sums[2 * i + 1] * scale1).to(h.dtype.element_ty), mask=mask)
