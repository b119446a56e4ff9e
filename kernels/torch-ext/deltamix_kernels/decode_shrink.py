"""h = x·V̂ᵀ from prepacked codes (prepack.py): shrink for decoding.

One program multiplies 8 ranks of one width with up to 16 inputs. Warp j of 8 takes element j of the
byte columns, whose inputs lie at j·columns + byte column. The warps' sums are added in one order,
so that two runs give the same bits.
"""

import triton
import triton.language as tl

from .decode_product import lanes, multiply, no_sums, over_warps, prefetch


@triton.jit
def shrink_tile(
    inputs,  # of every eight tokens int32 pointers: element 0 of token `first` + g
    h,  # [tokens, 16·total]
    tile,  # int32 pointer: first code, first rank, ranks, bits; codes in units of 16 bytes
    codes,
    slots,
    scales,
    first,
    tokens,
    total,
    units,
    dtype: tl.constexpr,
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before its predecessor ended: ask for codes, then wait for x
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write h of a tile's ranks for up to TOKENS tokens from `first` on; 8 warps.

    A tile of 0 bits gets zeros.
    """
    begin, rank = tl.load(tile), tl.load(tile + 1)
    count, bits = tl.load(tile + 2), tl.load(tile + 3)
    j, g, t = lanes(8)
    words = tl.pointer_type(tl.int32)
    if PTX:
        size = bits * units * 16
        for start in range(0, size, 512 * 8):
            prefetch(codes + begin.to(tl.int64) * 16 + start, size, size - start, count, 8)
    _, row, pair = lanes(1)
    column = 2 * pair
    slot0 = tl.load(slots + rank + column, mask=column < count, other=0)
    slot1 = tl.load(slots + rank + column + 1, mask=column + 1 < count, other=0)
    scale0 = tl.load(scales + rank + column, mask=column < count, other=0.0)
    scale1 = tl.load(scales + rank + column + 1, mask=column + 1 < count, other=0.0)
    # past the last rank: any codes
    at = codes.to(words) + begin.to(tl.int64) * 4 + tl.minimum(g, count - 1) * bits * units * 4
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before x is there: they read it
    given = ()
    for i in tl.static_range(TOKENS // 8):
        given = given + (inputs[i] + j * units * 8,)
    sums = no_sums(g, TOKENS)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            if bits == b:
                sums = multiply(
                    sums, at, units * 4, given, j, t, units, first + g, tokens, b, dtype,
                    TOKENS, 4, UNROLL, PTX,
                )  # fmt: skip
    sums = over_warps(sums, TOKENS, 8)
    for i in tl.static_range(TOKENS // 8):
        token = first + i * 8 + row
        to = h + token.to(tl.int64) * total * 16
        mask = (column < count) & (token < tokens)
        tl.store(to + slot0, (sums[2 * i] * scale0).to(h.dtype.element_ty), mask=mask)
        mask = (column + 1 < count) & (token < tokens)
        tl.store(to + slot1, (sums[2 * i + 1] * scale1).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "stride", "total", "units"])
def decode_shrink_kernel(
    x,  # [rows, 128·units] 16-bit floats, rows of `stride` 16 bytes, aligned
    h,  # [rows, 16·total] of x's dtype
    tiles,  # int32 [tiles, 4], see `shrink_tile`
    codes,  # uint8, prepacked
    slots,  # int32 [ranks]: where each lies in h
    scales,  # float32 [ranks]
    rows,
    stride,
    total,
    units,  # byte columns in units of 16
    WIDTHS: tl.constexpr,  # bit b: some tile may have width b
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid: tiles, blocks of TOKENS rows."""
    _, g, _ = lanes(8)
    first = tl.program_id(1) * TOKENS
    inputs = ()
    for i in tl.static_range(TOKENS // 8):
        row = (first + 8 * i + g).to(tl.int64)
        inputs = inputs + (x.to(tl.pointer_type(tl.int32)) + row * stride * 4,)
    shrink_tile(
        inputs, h, tiles + tl.program_id(0) * 4, codes, slots, scales, first, rows, total, units,
        x.dtype.element_ty, WIDTHS, PTX, PDL, TOKENS, UNROLL,
    )  # fmt: skip
