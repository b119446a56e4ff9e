"""Device functions that turn packed codes into numbers, in registers.

A packed factor is a byte matrix; byte column c holds elements 8c to 8c+7 of every rank, and a rank
of width b owns b byte rows, split into planes of 8, 4, 2 and 1 bits, the highest bits first
(docs/format.md). Element j of a plane of p bits lies in byte row j·p // 8 at shift j·p % 8.
"""

import triton
import triton.language as tl


@triton.jit
def _plane(code, byte, j: tl.constexpr, p: tl.constexpr, above: tl.constexpr, row_stride, mask):
    """`code` with the p bits of element j appended; `above`: byte rows of the planes before."""
    at = byte + (above + (j * p) // 8) * row_stride
    found = tl.load(at, mask=mask, other=0).to(tl.int32)
    return (code << p) | ((found >> ((j * p) % 8)) & ((1 << p) - 1))


@triton.jit
def _element(byte, j: tl.constexpr, bits: tl.constexpr, row_stride, mask):
    """Codes int32 of element j of the byte columns at `byte` (the first byte row of each rank)."""
    code = tl.zeros(byte.shape, tl.int32)
    if bits & 8:
        code = _plane(code, byte, j, 8, 0, row_stride, mask)
    if bits & 4:
        code = _plane(code, byte, j, 4, bits & 8, row_stride, mask)
    if bits & 2:
        code = _plane(code, byte, j, 2, bits & 12, row_stride, mask)
    if bits & 1:
        code = _plane(code, byte, j, 1, bits & 14, row_stride, mask)
    return code


@triton.jit
def codes(byte, bits: tl.constexpr, row_stride, mask):
    """Codes int32 [R, 8·C] of the byte columns at `byte` [R, C], in the order of the elements."""
    e0 = _element(byte, 0, bits, row_stride, mask)
    e1 = _element(byte, 1, bits, row_stride, mask)
    e2 = _element(byte, 2, bits, row_stride, mask)
    e3 = _element(byte, 3, bits, row_stride, mask)
    e4 = _element(byte, 4, bits, row_stride, mask)
    e5 = _element(byte, 5, bits, row_stride, mask)
    e6 = _element(byte, 6, bits, row_stride, mask)
    e7 = _element(byte, 7, bits, row_stride, mask)
    # tl.join adds a last dimension: the highest bit of the element's number comes first
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [byte.shape[0], 8 * byte.shape[1]])


@triton.jit
def number(code):
    """float32 of small integers. Written into the mantissa of 2^23: the hardware's own conversion
    runs at an eighth of the speed of additions."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def cubic(code, bits: tl.constexpr):
    """Levels float32 of the Gaussian codebook, alpha·c + beta·c³ (docs/format.md)."""
    if bits == 1:
        alpha, beta = 1.5957691, 0.0
    elif bits == 2:
        alpha, beta = 0.892898, 0.0506908
    elif bits == 3:
        alpha, beta = 0.471466, 0.0115843
    elif bits == 4:
        alpha, beta = 0.240515, 0.00209738
    elif bits == 5:
        alpha, beta = 0.121831, 3.36750e-4
    elif bits == 6:
        alpha, beta = 0.0617039, 5.08628e-5
    elif bits == 7:
        alpha, beta = 0.0312720, 7.40792e-6
    else:
        alpha, beta = 0.0158606, 1.05197e-6
    c = number(code) - ((1 << bits) - 1) * 0.5
    return c * (alpha + beta * c * c)


@triton.jit
def bfloat(bits):
    """float32 of bfloat16 bit patterns in int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _one_plane(code, packed, row, element, p: tl.constexpr, above: tl.constexpr, columns, mask):
    at = (row + above + (element * p) // 8).to(tl.int64) * columns
    found = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
    return (code << p) | ((found >> ((element * p) % 8)) & ((1 << p) - 1))


@triton.jit
def code_of(packed, row, bits: tl.constexpr, element, columns, mask):
    """Codes int32 of single elements, in the shape of `mask`, with which `row`, each rank's first
    byte row, and `element` broadcast."""
    packed += element // 8
    element = element % 8
    code = tl.zeros(mask.shape, tl.int32)
    if bits & 8:
        code = _one_plane(code, packed, row, element, 8, 0, columns, mask)
    if bits & 4:
        code = _one_plane(code, packed, row, element, 4, bits & 8, columns, mask)
    if bits & 2:
        code = _one_plane(code, packed, row, element, 2, bits & 12, columns, mask)
    if bits & 1:
        code = _one_plane(code, packed, row, element, 1, bits & 14, columns, mask)
    return code


@triton.jit
def factor(
    packed,  # uint8 [byte rows, columns] of one side
    ranks,  # int16 [k, stride]: widths, then scales
    zeros,  # uint8 of the zero points; unused by the Gaussian codebook
    first_row,  # of the tile's codes
    first_zero_row,
    first_rank,
    count,  # ranks of the tile
    bits,
    zero_bits,
    column,  # first byte column wanted
    columns,
    stride,  # of `ranks`
    scale_column,  # of this side's first scale in `ranks`
    zero_columns,
    GROUP: tl.constexpr,  # elements of a scale group; 0: one group
    GAUSSIAN: tl.constexpr,
    WIDTHS: tl.constexpr,  # bit b: some tile has width b
    ZERO_WIDTHS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Values float32 [R, 8·C] of a rank tile, without its scales where there is one group.

    Ranks past `count` and columns past the end are 0 times anything finite; callers mask.
    """
    r = tl.arange(0, R)
    c = column + tl.arange(0, C)
    live = r < count
    mask = live[:, None] & (c < columns)[None, :]
    value = tl.zeros([R, 8 * C], tl.float32)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            if bits == b:
                row = (first_row + r * b).to(tl.int64)
                byte = packed + row[:, None] * columns + c[None, :]
                code = codes(byte, b, columns, mask)
                if GAUSSIAN:
                    value = cubic(code, b)
                else:
                    value = number(code)
    if (not GAUSSIAN) or GROUP > 0:
        group = 0
        if GROUP > 0:
            group = column * 8 // GROUP
        at = (first_rank + r).to(tl.int64) * stride + scale_column + group
        if not GAUSSIAN:
            zero = tl.zeros([R], tl.float32)
            for b in tl.static_range(1, 9):
                if (ZERO_WIDTHS >> b) & 1:
                    if zero_bits == b:
                        row = first_zero_row + r * b
                        zero = number(
                            code_of(zeros, row, b, scale_column - 1 + group, zero_columns, live)
                        )
            value = value - zero[:, None]
        if GROUP > 0:
            value = value * bfloat(tl.load(ranks + at, mask=live, other=0))[:, None]
    return value


@triton.jit
def whole_scales(ranks, first_rank, count, stride, scale_column, R: tl.constexpr):
    """Scales float32 [R] of a rank tile with one scale a vector; 0 past `count`."""
    r = tl.arange(0, R)
    at = (first_rank + r).to(tl.int64) * stride + scale_column
    return bfloat(tl.load(ranks + at, mask=r < count, other=0))
