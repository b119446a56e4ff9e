"""h = x·V̂ᵀ of up to 64 rows from prepacked codes (prepack.py): shrink for decoding.

One program multiplies R ranks of one width with a range of byte columns. Its S warps each take
every S-th block of C byte columns and add up at the end. A byte column holds 8 elements, and there
is one `tl.dot` for each of them, so codes are never rearranged: prepacking put element j of byte
column c at input j·columns + c, where x is read without strides. Programs that share ranks add up
in a fixed order (`reduce`), so that two runs give the same bits.
"""

import triton
import triton.language as tl

from .decode import dot
from .levels import byte_rows, level


@triton.jit
def reduce(value, place, live, parts, arrived, part, count, MOST: tl.constexpr, SIZE: tl.constexpr):
    """Sum of the values float32 of `count` <= MOST programs, made by the last one to arrive.

    Returns it and whether this is that program. place: where the elements lie in a part of SIZE
    floats; live: which of them count; parts: where the first part lies; part: this program's
    number; arrived: an int32 0, which the last one sets back.
    """
    last = count == 1
    if not last:
        tl.store(parts + part * SIZE + place, value, mask=live)
        tl.debug_barrier()  # all warps have stored before one tells
        last = tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1
        if last:
            tl.store(arrived, 0)
            value = tl.zeros_like(value)
            for i in tl.static_range(MOST):
                at = i * SIZE + place
                mask = live & (at < count * SIZE)
                value += tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
    return value, last


@triton.jit
def shrink_sums(
    x,
    codes,  # of the first rank
    m,  # int [M]: rows of x
    rows,
    count,  # ranks
    begin,  # byte columns begin to end
    end,
    n,
    x_stride,
    columns,
    bits: tl.constexpr,
    EVEN: tl.constexpr,
    LOOKUP: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Sums float32 [R, M] of a range of byte columns, without scales."""
    dtype: tl.constexpr = x.dtype.element_ty
    s = tl.arange(0, S)[:, None, None] * C
    r = tl.arange(0, R)[None, :, None]
    sums = tl.zeros([S, R, M], tl.float32)
    for column in range(begin, end, S * C):
        along = column + s + tl.arange(0, C)[None, None, :]  # [S, 1, C]
        down = column + s + tl.arange(0, C)[None, :, None]  # [S, C, 1]
        mask = r < count
        inputs = (m < rows)[None, None, :]
        if not EVEN:
            mask = mask & (along < end)
            inputs = inputs & (down < end)
        byte = byte_rows(codes + r * (bits * columns) + along, columns, mask, bits)
        for j in tl.static_range(8):
            if not EVEN:
                inputs = (m < rows)[None, None, :] & (down < end) & (j * columns + down < n)
            at = x + m[None, None, :] * x_stride + (j * columns + down)
            part = tl.load(at, mask=inputs, other=0.0)
            sums = dot(level(byte, j, bits, dtype, LOOKUP), part, sums, not LOOKUP)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["rows"])
def decode_shrink_kernel(
    x,  # [rows, n]
    h,  # [rows, total] of x's dtype
    parts,  # float32 [row blocks · tiles · splits, R, M]
    arrived,  # int32 [row blocks · tiles], zeros
    tiles,  # int32 [tiles, 4], see prepack.py
    codes,  # uint8, prepacked
    slots,  # int32 [ranks]: where each rank lies in h
    scales,  # float32 [ranks]
    rows,
    n,
    x_stride,
    total,
    columns,  # byte columns
    share,  # byte columns of one program, a multiple of S·C
    EVEN: tl.constexpr,  # no program's range ends within S·C byte columns, none of them is padding
    WIDTHS: tl.constexpr,  # bit b: some tile has width b
    LOOKUP: tl.constexpr,
    PDL: tl.constexpr,  # let a dependent launch start at once
    SPLITS: tl.constexpr,  # programs that share a tile's columns
    M: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * M + tl.arange(0, M)
    r = tl.arange(0, R)
    codes += tl.load(tiles + tile * 4).to(tl.int64) * 16
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    bits = tl.load(tiles + tile * 4 + 3)
    slot = tl.load(slots + first + r, mask=r < count, other=0)
    scale = tl.load(scales + first + r, mask=r < count, other=0.0)
    begin = split * share
    end = tl.minimum(begin + share, columns)
    sums = tl.zeros([R, M], tl.float32)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            if bits == b:
                sums = shrink_sums(
                    x, codes, m, rows, count, begin, end, n, x_stride, columns,
                    b, EVEN, LOOKUP, M, S, R, C,
                )  # fmt: skip
    block = tl.program_id(2) * tl.num_programs(0) + tile
    place = r[:, None] * M + tl.arange(0, M)[None, :]
    live = (r < count)[:, None] & (m < rows)[None, :]
    sums, last = reduce(
        sums, place, live, parts + block.to(tl.int64) * (SPLITS * R * M), arrived + block, split,
        SPLITS, SPLITS, R * M,
    )  # fmt: skip
    if last:
        at = h + m[None, :] * total + slot[:, None]
        tl.store(at, (sums * scale[:, None]).to(h.dtype.element_ty), mask=live)
