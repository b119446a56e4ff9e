"""y += h·Ûᵀ from prepacked codes (prepack.py): expand for decoding.

One program makes 8 byte columns (64 outputs) of one matrix from all ranks, width after width. Warp
j of 8 takes element j of the byte columns.
"""

import triton
import triton.language as tl

from .decode_product import lanes, multiply, over_warps, prefetch, touch

_POWERS = tl.constexpr([1, 1, 2, 4, 4, 8, 8, 8, 8])  # the next power of two


@triton.jit
def runs_of(runs, known, WIDTHS: tl.constexpr):
    """Of each width 1 to 8, (first code, first slot, slots) of its ranks, in units of 16.

    None of any width if `known` is false; `runs` may be anything then.
    """
    found = ()
    for b in tl.static_range(8):
        if (WIDTHS >> (b + 1)) & 1:
            at = runs + b * 4
            some = ()
            for i in tl.static_range(3):
                some = some + (tl.load(at + i, mask=known, other=0),)
            found = found + (some,)
        else:
            found = found + ((0, 0, 0),)
    return found


@triton.jit
def _stretch(codes, run, tile, columns, COLUMNS: tl.constexpr):
    """(first byte, bytes to the next byte row, bytes) of a tile's codes of one width."""
    begin, _, size = run
    here = tl.minimum(COLUMNS, columns - tile * COLUMNS) * size * 16
    at = codes + begin.to(tl.int64) * 16 + tile * COLUMNS * size * 16
    return at, columns * size * 16, here


@triton.jit
def prefetch_ranks(
    codes, found, tile, columns, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Ask for the codes of a tile of COLUMNS byte columns, of all widths; see `prefetch`."""
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            at, plane, here = _stretch(codes, found[b - 1], tile, columns, COLUMNS)
            prefetch(at, plane, here, b, WARPS)


@triton.jit
def touch_ranks(
    codes, found, tile, columns, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Load the codes of a tile, or most of them, into the L1 cache; see `touch`."""
    words = tl.zeros([32 * WARPS], tl.int32)
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            at, plane, here = _stretch(codes, found[b - 1], tile, columns, COLUMNS)
            words |= touch(at, plane, here, b, _POWERS[b], WARPS)
    return words


@triton.jit
def add_ranks(
    sums,
    codes,
    found,  # see `runs_of`
    inputs,  # of every eight tokens int32 pointers: slot 0 of h
    column,  # byte column of U
    columns,
    j,  # element of the byte column
    first,  # this thread's first 16 ranks of each width, in units of 16
    token,
    tokens,
    dtype: tl.constexpr,
    WIDTHS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
):
    """sums + the product of the ranks of all widths; see `multiply`."""
    for b in tl.static_range(1, 9):
        if (WIDTHS >> b) & 1:
            begin, slot, size = found[b - 1]
            at = codes.to(tl.pointer_type(tl.int32)) + begin.to(tl.int64) * 4 + column * size * 4
            given = ()
            for i in tl.static_range(TOKENS // 8):
                given = given + (inputs[i] + slot * 8,)
            sums = multiply(
                sums, at, columns * size * 4, given, j, first, size, token, tokens,
                b, dtype, TOKENS, STEP, UNROLL, PTX,
            )  # fmt: skip
    return sums


@triton.jit
def expand_tile(
    outputs,  # of every eight tokens pointers: output 0 of token `first` + g
    change,  # float32 to add to the sums of outputs (2·t + 0 and 1)·8 + j, a tuple
    inputs,  # of every eight tokens int32 pointers: slot 0 of h
    runs,  # see `runs_of`
    known,
    codes,
    tile,  # of 8 byte columns
    length,  # outputs of the matrix
    first,
    tokens,
    dtype: tl.constexpr,
    ADD: tl.constexpr,  # add to what the outputs hold
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # launched before its predecessor ended: fetch codes, then wait for h
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write one tile of outputs of up to TOKENS tokens from `first` on; 8 warps."""
    columns = (length + 7) // 8
    j, g, t = lanes(8)
    found = runs_of(runs, known, WIDTHS)
    if PTX:
        prefetch_ranks(codes, found, tile, columns, WIDTHS, 8, 8)
    if PDL:
        tl.extra.cuda.gdc_wait()
    column = tl.minimum(tile * 8 + g, columns - 1)  # past the end: any codes
    sums = ()
    for i in tl.static_range(TOKENS):
        value = tl.zeros(g.shape, tl.float32)
        if i % 8 < 2:
            value += change[i % 8]
            if ADD:
                output = (tile * 8 + 2 * t + i % 8) * 8 + j
                live = (output < length) & (first + g + i // 8 * 8 < tokens)
                value += tl.load(outputs[i // 8] + output, mask=live, other=0.0).to(tl.float32)
        sums = sums + (value,)
    sums = add_ranks(
        sums, codes, found, inputs, column, columns, j, t, first + g, tokens,
        dtype, WIDTHS, TOKENS, 4, UNROLL, PTX,
    )  # fmt: skip
    sums = over_warps(sums, TOKENS, 1)
    for i in tl.static_range(TOKENS // 4):
        output = (tile * 8 + 2 * t + i % 2) * 8 + j
        live = (output < length) & (first + g + i // 2 * 8 < tokens)
        to = outputs[i // 2]
        tl.store(to + output, sums[i].to(to.dtype.element_ty), mask=live)


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
    ADD: tl.constexpr,
    WIDTHS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid: tiles of all matrices, blocks of TOKENS rows."""
    tile = tl.program_id(0)
    y, length = y0, m0
    if tile >= (m0 + 63) // 64:
        tile -= (m0 + 63) // 64
        runs += 32
        y, length = y1, m1
        if tile >= (m1 + 63) // 64:
            tile -= (m1 + 63) // 64
            runs += 32
            y, length = y2, m2
    _, g, _ = lanes(8)
    first = tl.program_id(1) * TOKENS
    none = tl.zeros(g.shape, tl.float32)
    inputs, outputs = (), ()
    for i in tl.static_range(TOKENS // 8):
        token = (first + 8 * i + g).to(tl.int64)
        inputs = inputs + (h.to(tl.pointer_type(tl.int32)) + token * total * 8,)
        outputs = outputs + (y + token * length,)
    expand_tile(
        outputs, (none, none), inputs, runs, True, codes, tile, length, first, rows,
        h.dtype.element_ty, ADD, WIDTHS, PTX, PDL, TOKENS, UNROLL,
    )  # fmt: skip
