"""y += h·Ûᵀ of up to 64 rows from prepacked codes (prepack.py): expand for decoding.

One program makes C byte columns (8·C outputs) of one matrix from a range of ranks of one width.
Its S warps each take every S-th block of R ranks and add up at the end. There is one `tl.dot` for
each of a byte column's 8 elements; ranks lie contiguously, so no code is rearranged. Programs that
share outputs add up in a fixed order (`reduce`).
"""

import triton
import triton.language as tl

from .decode import dot
from .decode_shrink import reduce
from .levels import byte_rows, level


@triton.jit
def _prefetch(codes, count, stride, plane, bits: tl.constexpr, C: tl.constexpr):
    """Ask for the codes of C byte columns, `count` ranks each, to come to the L2 cache."""
    tl.static_assert(C * bits <= 128)
    lane = tl.arange(0, 128)
    row = lane // C % bits
    line = lane // C // bits * 128
    at = codes + row * plane + lane % C * stride + line
    for start in range(0, count, 128 // C // bits * 128):
        wanted = (line < 128 // C // bits * 128) & (start + line < count)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [(at + start).to(tl.int64), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def expand_sums(
    h,  # of the first rank
    codes,  # of the first rank and byte column
    m,
    rows,
    count,
    total,
    stride,  # bytes from one byte column to the next
    plane,  # bytes from one byte row to the next
    columns,  # byte columns to the end
    bits: tl.constexpr,
    LOOKUP: tl.constexpr,
    PDL: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Sums float32 [C, M, 8] over a range of ranks."""
    dtype: tl.constexpr = h.dtype.element_ty
    if PDL:
        _prefetch(codes, count, stride, plane, bits, C)
        tl.extra.cuda.gdc_wait()
    s = tl.arange(0, S)[:, None, None] * R
    c = tl.minimum(tl.arange(0, C), columns - 1)  # past the end: any codes
    column = c[None, :, None] * stride
    e0 = tl.zeros([S, C, M], tl.float32)
    e1, e2, e3, e4, e5, e6, e7 = e0, e0, e0, e0, e0, e0, e0
    for start in range(0, count, S * R):
        along = start + s + tl.arange(0, R)[None, None, :]  # [S, 1, R]
        down = start + s + tl.arange(0, R)[None, :, None]  # [S, R, 1]
        byte = byte_rows(codes + column + along, plane, along < count, bits)
        mask = (down < count) & (m < rows)[None, None, :]
        inner = tl.load(h + m[None, None, :] * total + down, mask=mask, other=0.0)
        e0 = dot(level(byte, 0, bits, dtype, LOOKUP), inner, e0, not LOOKUP)
        e1 = dot(level(byte, 1, bits, dtype, LOOKUP), inner, e1, not LOOKUP)
        e2 = dot(level(byte, 2, bits, dtype, LOOKUP), inner, e2, not LOOKUP)
        e3 = dot(level(byte, 3, bits, dtype, LOOKUP), inner, e3, not LOOKUP)
        e4 = dot(level(byte, 4, bits, dtype, LOOKUP), inner, e4, not LOOKUP)
        e5 = dot(level(byte, 5, bits, dtype, LOOKUP), inner, e5, not LOOKUP)
        e6 = dot(level(byte, 6, bits, dtype, LOOKUP), inner, e6, not LOOKUP)
        e7 = dot(level(byte, 7, bits, dtype, LOOKUP), inner, e7, not LOOKUP)
    # tl.join adds a last dimension: the highest bit of the element's number comes first
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.sum(tl.join(even, odd), 0), [C, M, 8])


@triton.jit(do_not_specialize=["rows"])
def decode_expand_kernel(
    h,  # [rows, total] of y's dtype
    y0,  # [rows, m] of each matrix
    y1,
    y2,
    parts,  # float32 [row blocks · tiles, C, M, 8]
    arrived,  # int32 [row blocks · tiles], zeros; counted at a block's first tile
    tiles,  # int32 [tiles, 12], see prepack.py
    codes,  # uint8, prepacked
    rows,
    total,
    m0,
    m1,
    m2,
    ADD: tl.constexpr,  # add to what y holds
    WIDTHS: tl.constexpr,
    LOOKUP: tl.constexpr,
    PDL: tl.constexpr,  # launched before its predecessor ended: fetch codes, then wait for h
    MOST: tl.constexpr,  # programs that share outputs, at most
    M: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = tiles + pid * 12
    codes += tl.load(tile).to(tl.int64) * 16
    h += tl.load(tile + 1) * 16
    count = tl.load(tile + 2) * 16
    bits = tl.load(tile + 3)
    stride = tl.load(tile + 4) * 16
    columns = tl.load(tile + 5)
    plane = columns * stride
    column = tl.load(tile + 6)
    matrix = tl.load(tile + 7)
    part = tl.load(tile + 8)
    shared = tl.load(tile + 9)
    m = tl.program_id(1) * M + tl.arange(0, M)
    sums = tl.zeros([C, M, 8], tl.float32)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            if bits == b:
                sums = expand_sums(
                    h, codes, m, rows, count, total, stride, plane, columns - column,
                    b, LOOKUP, PDL, M, S, R, C,
                )  # fmt: skip
    block = tl.program_id(1) * tl.num_programs(0) + pid - part
    c = tl.arange(0, C)[:, None, None]
    e = tl.arange(0, 8)[None, None, :]
    place = (c * M + tl.arange(0, M)[None, :, None]) * 8 + e
    live = ((m < rows)[None, :, None]) & (c < columns - column) & (e >= 0)
    sums, last = reduce(
        sums, place, live, parts + block.to(tl.int64) * (8 * M * C), arrived + block, part, shared,
        MOST, 8 * M * C,
    )  # fmt: skip
    if last:
        y, length = y0, m0
        if matrix == 1:
            y, length = y1, m1
        if matrix == 2:
            y, length = y2, m2
        output = (column + c) * 8 + e
        at = y + m[None, :, None].to(tl.int64) * length + output
        mask = (m < rows)[None, :, None] & (output < length)
        if ADD:
            sums += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, sums.to(y0.dtype.element_ty), mask=mask)
