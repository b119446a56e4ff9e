"""Products of packed codes by single tensor core instructions, with operands only in registers.

Every tensor here has one element a thread. Lane 4g + t of a warp holds, of mma.m16n8k16: of the
first operand token g, of the second its column g, and of the result token g, columns 2t and 2t + 1.
A sum's terms may come in any order as long as both operands have the same: a lane takes
neighbouring ones, where the instruction means 2t, 2t + 1, 2t + 8 and 2t + 9. So a word of codes,
four byte columns of one element, becomes half of a column of two instructions, and nothing passes
through shared memory.
"""

import triton
import triton.language as tl

from .levels import constants, level_words

_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
_MMAS = tl.constexpr([_MMA.format(t) for t in ("bf16", "f16")])
# by whether it is masked, and how many 16 bytes ahead
_LOAD = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4 + AHEAD];"
_MASK = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p " + _LOAD + " }"
_ONCE = _LOAD.replace("global", "global.cg")  # leaves the L1 cache to others
_LOADS = tl.constexpr(
    [[text.replace("AHEAD", str(16 * i)) for i in range(256)] for text in (_LOAD, _MASK, _ONCE)]
)


@triton.jit
def lanes(WARPS: tl.constexpr):
    """(warp, g, t) of every thread."""
    i = tl.arange(0, 32 * WARPS)
    return i // 32, i % 32 // 4, i % 4


@triton.jit
def four(at, mask=None):
    """Four words from each address on, an int32 pointer to 16 aligned bytes; 0 where masked."""
    words = at[:, None] + tl.arange(0, 4)[None, :]
    if mask is None:
        both = tl.load(words)
    else:
        both = tl.load(words, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(both, [at.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load(address, ahead: tl.constexpr, PTX: tl.constexpr, ONCE: tl.constexpr = False):
    """Four words from 16·ahead bytes after each address int64 on. ONCE: not by the L1 cache.

    Triton's own load would take a pointer for each distance.
    """
    if not PTX:
        return four(address.to(tl.pointer_type(tl.int32)) + ahead * 4)
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        _LOADS[2 if ONCE else 0][ahead], "=r,=r,=r,=r,l", [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return w0, w1, w2, w3


@triton.jit
def load_some(address, ahead: tl.constexpr, mask, others, PTX: tl.constexpr):
    """The same; where masked the four words `others`, or in the interpreter 0.

    If others are what the same load gave the last time, a masked thread's registers stay.
    """
    if not PTX:
        return four(address.to(tl.pointer_type(tl.int32)) + ahead * 4, mask)
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        _LOADS[1][ahead], "=r,=r,=r,=r,l,r,0,1,2,3",
        [address, mask.to(tl.int32), others[0], others[1], others[2], others[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return w0, w1, w2, w3


@triton.jit
def addresses(pointers, PTX: tl.constexpr):
    """int64 of pointers; LLVM would take these apart and put them together for each load."""
    found = ()
    for i in tl.static_range(len(pointers)):
        at = pointers[i].to(tl.int64)
        if PTX:
            at = tl.inline_asm_elementwise(
                "mov.b64 $0, $1;", "=l,l", [at], dtype=tl.int64, is_pure=True, pack=1
            )
        found = found + (at,)
    return found


@triton.jit
def advanced(addresses, units):
    """Every address so many 16 bytes further."""
    found = ()
    for i in tl.static_range(len(addresses)):
        found = found + (addresses[i] + units * 16,)
    return found


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """Two floats from a word of two 16-bit ones."""
    low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, ((word >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _operand(first, second, dtype: tl.constexpr):
    """[warp, 8, 16] of one operand's two words a lane."""
    a, b = _halves(first, dtype)
    c, d = _halves(second, dtype)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [first.shape[0] // 32, 8, 16])


@triton.jit
def _product(sums, a, b):
    """sums of two columns a lane + a·bᵀ; a and b [warp, 8, 16]."""
    found = tl.dot(a, tl.permute(b, (0, 2, 1)), input_precision="ieee")
    c0, c1 = tl.split(tl.reshape(found, [sums[0].shape[0], 2]))
    return sums[0] + c0, sums[1] + c1


@triton.jit
def _mma(sums, a, b0, b1, dtype: tl.constexpr, PTX: tl.constexpr):
    """sums + one instruction's product, as four float32 a thread."""
    if not PTX:
        b = _operand(b0, b1, dtype)
        c0, c1 = _product((sums[0], sums[1]), _operand(a[0], a[2], dtype), b)
        c2, c3 = _product((sums[2], sums[3]), _operand(a[1], a[3], dtype), b)
        return c0, c1, c2, c3
    else:
        text: tl.constexpr = _MMAS[0] if dtype == tl.bfloat16 else _MMAS[1]
        return tl.inline_asm_elementwise(
            text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b0, b1, sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def no_sums(like, TOKENS: tl.constexpr):
    """Zeros for `mma`: eight float32 a thread and eight tokens."""
    zero = tl.zeros(like.shape, tl.float32)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (zero,)
    return sums


@triton.jit
def no_words(like, count: tl.constexpr):
    """So many zeros int32 a thread."""
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros(like.shape, tl.int32),)
    return found


@triton.jit
def some_of(sums, first: tl.constexpr, count: tl.constexpr):
    """A part of a tuple."""
    found = ()
    for i in tl.static_range(first, first + count):
        found = found + (sums[i],)
    return found


@triton.jit
def mma(sums, inputs, b, dtype: tl.constexpr, TOKENS: tl.constexpr, PTX: tl.constexpr):
    """sums + the product of 32 terms: four words a thread of each eight tokens and of a column.

    The words of a token, as they were loaded, are the first operand of two instructions. It has
    rows for tokens g and g + 8; both mean token g here, the first with words 0 and 2, the second
    with words 1 and 3. The first instruction gets words 0 and 2 of the column, and only its first
    row counts, the other one words 1 and 3.
    """
    done = ()
    for i in tl.static_range(TOKENS // 8):
        a = inputs[i]
        even, odd = some_of(sums, 8 * i, 4), some_of(sums, 8 * i + 4, 4)
        done = done + _mma(even, a, b[0], b[2], dtype, PTX) + _mma(odd, a, b[1], b[3], dtype, PTX)
    return done


@triton.jit
def mma_of_16(sums, first, second, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """The same for tokens g and g + 8, four words each: as the instruction means it.

    It takes half the instructions and sums, four, but copies of inputs, which pay where several
    columns use them.
    """
    sums = _mma(sums, (first[0], second[0], first[1], second[1]), b[0], b[1], dtype, PTX)
    return _mma(sums, (first[2], second[2], first[3], second[3]), b[2], b[3], dtype, PTX)


@triton.jit
def prefetch(codes, plane, length, count, WARPS: tl.constexpr):
    """Ask for `count` <= 8 stretches of at most 512·WARPS bytes to come to the L2 cache."""
    i = tl.arange(0, 32 * WARPS)
    row, line = i // (4 * WARPS), i % (4 * WARPS) * 128
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [(codes + row * plane + line).to(tl.int64), ((row < count) & (line < length)).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def touch(at, plane, length, count, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Load `count` <= ROWS stretches into the L1 cache, of each up to 1024·WARPS / ROWS bytes.

    What it returns, an int32 a thread, must be used, or nothing is loaded.
    """
    i, lanes_of_row = tl.arange(0, 32 * WARPS), 32 * WARPS // ROWS
    row, byte = i // lanes_of_row, i % lanes_of_row * 32
    where = (at + row * plane + byte).to(tl.pointer_type(tl.int32))
    return tl.load(where, mask=(row < count) & (byte < length), other=0)


@triton.jit
def byte_rows(at, plane, j, bits: tl.constexpr):
    """Of every plane of a width, pointers to the byte row that holds element j."""
    if bits == 8:
        return (at + j * plane,)
    elif bits == 7:
        return at + j // 2 * plane, at + (4 + j // 4) * plane, at + 6 * plane
    elif bits == 6:
        return at + j // 2 * plane, at + (4 + j // 4) * plane
    elif bits == 5:
        return at + j // 2 * plane, at + 4 * plane
    elif bits == 4:
        return (at + j // 2 * plane,)
    elif bits == 3:
        return at + j // 4 * plane, at + 2 * plane
    elif bits == 2:
        return (at + j // 4 * plane,)
    else:
        return (at,)


@triton.jit
def _step(
    rows, inputs, ahead: tl.constexpr, inside, live, before, FIRST: tl.constexpr, PTX: tl.constexpr
):
    """Words of the step so many units of 16 terms ahead: two halves of inputs, the planes' codes.

    Inputs of tokens that are not `live` are those of `before`, zeros or an earlier step. Codes are
    zeros if not `inside`; None: surely. FIRST: codes before inputs. ptxas keeps the order of loads,
    and at times puts others' use between.
    """
    codes, given = (), ()
    zero = tl.zeros(rows[0].shape, tl.int32)
    for order in tl.static_range(2):
        if (order == 0) == FIRST:
            for i in tl.static_range(len(rows)):
                if inside is None:
                    codes = codes + load(rows[i], ahead, PTX)
                else:
                    codes = codes + load_some(rows[i], ahead, inside, (zero, zero, zero, zero), PTX)
        else:
            for half in tl.static_range(2):
                for i in tl.static_range(len(inputs)):
                    others = some_of(before, 4 * (half * len(inputs) + i), 4)
                    given = given + load_some(inputs[i], 2 * ahead + half, live[i], others, PTX)
    return given + codes


@triton.jit
def _masked(masks, also):
    """Every one of a tuple of masks, and `also`."""
    found = ()
    for i in tl.static_range(len(masks)):
        found = found + (masks[i] & also,)
    return found


@triton.jit
def _sums(
    sums, loads, j, fixed, bits: tl.constexpr, dtype: tl.constexpr,
    TOKENS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """sums + the product of some `_step`s."""
    blocks: tl.constexpr = TOKENS // 8
    planes: tl.constexpr = 1 if bits == 8 else (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1)
    codes: tl.constexpr = 8 * blocks  # of a step, the first word of codes
    size: tl.constexpr = codes + 4 * planes
    for start in tl.static_range(0, len(loads), size):
        for half in tl.static_range(2):
            b, a = (), ()
            for i in tl.static_range(planes):
                b += some_of(loads, start + codes + 4 * i + 2 * half, 2)
            for i in tl.static_range(blocks):
                a = a + (some_of(loads, start + 4 * (half * blocks + i), 4),)
            b = level_words(b, j, fixed, bits, dtype, PTX)
            sums = mma(sums, a, b, dtype, TOKENS, PTX)
    return sums


@triton.jit
def multiply(
    sums,  # see `mma`
    codes,  # int32 pointers: first byte row of this thread's column of the product
    plane,  # words from one byte row to the next
    inputs,  # of every eight tokens int32 pointers: first input of token g
    j,  # element of the byte columns
    first,  # this thread's first 16 terms, in units of 16
    length,  # terms, in units of 16
    token,  # g and the first of the tokens
    tokens,  # how many exist
    bits: tl.constexpr,
    dtype: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,  # units of 16 terms of all threads that share a sum
    UNROLL: tl.constexpr,  # steps whose codes are loaded before the first is used
    PTX: tl.constexpr,
):
    """sums + the product of all terms.

    No masked load leaves a register undefined: it would be in use around whatever loop this is in
    (242 registers for 80, and three times the instructions outside of loops).
    """
    rows, to, live = byte_rows(codes + first * 4, plane, j, bits), (), ()
    fixed = constants((token + tokens) >> 31, bits, dtype, PTX)
    for i in tl.static_range(len(inputs)):
        to = to + (inputs[i] + first * 8,)
        live = live + (token + 8 * i < tokens,)
    rows, to = addresses(rows, PTX), addresses(to, PTX)
    some: tl.constexpr = STEP * UNROLL
    whole = length // some * some
    of_inputs: tl.constexpr = TOKENS  # words of a step
    none = no_words(first, of_inputs)
    if UNROLL == 1:
        before = none
        for _ in range(0, whole, some):
            step = _step(rows, to, 0, None, live, before, False, PTX)
            sums = _sums(sums, step, j, fixed, bits, dtype, TOKENS, PTX)
            rows, to = advanced(rows, some), advanced(to, 2 * some)
            before = some_of(step, 0, of_inputs)
    else:
        # One half of the steps is loaded while the other is multiplied; the last ones load what
        # they have once more.
        half: tl.constexpr = UNROLL // 2
        size: tl.constexpr = of_inputs + 4 * len(rows)  # words of a step
        any_whole, loads = first * 0 < whole, ()
        for u in tl.static_range(half):
            here = _masked(live, any_whole)
            loads += _step(rows, to, u * STEP, any_whole, here, none, True, PTX)
        later = no_words(first, half * size)
        for start in range(some, whole + 1, some):
            others, following = later, ()
            later = ()
            for u in tl.static_range(half):
                before = some_of(others, u * size, of_inputs)
                later += _step(rows, to, (half + u) * STEP, None, live, before, True, PTX)
            sums = _sums(sums, loads, j, fixed, bits, dtype, TOKENS, PTX)
            further = tl.where(start < whole, some, 0)
            rows, to = advanced(rows, further), advanced(to, 2 * further)
            for u in tl.static_range(half):
                before = some_of(loads, u * size, of_inputs)
                following += _step(rows, to, u * STEP, None, live, before, True, PTX)
            sums = _sums(sums, later, j, fixed, bits, dtype, TOKENS, PTX)
            loads = following
        further = tl.where(whole > 0, some, 0)
        rows, to = advanced(rows, further), advanced(to, 2 * further)
    for start in range(whole, length, STEP):
        within = start + first < length
        last = _step(rows, to, 0, within, _masked(live, within), none, True, PTX)
        sums = _sums(sums, last, j, fixed, bits, dtype, TOKENS, PTX)
        rows, to = advanced(rows, STEP), advanced(to, 2 * STEP)
    return sums


@triton.jit
def over_warps(sums, TOKENS: tl.constexpr, SHARE: tl.constexpr):
    """What `mma` summed, added up over groups of SHARE neighbouring warps.

    Columns 2t and 2t + 1 of token g, and of token g + 8 for 16 tokens, one element a thread of the
    remaining warps.
    """
    c0, c1 = sums[0] + sums[6], sums[1] + sums[7]
    rest: tl.constexpr = c0.shape[0] // 32 // SHARE
    if TOKENS == 8:
        if SHARE == 1:
            return c0, c1
        both = tl.sum(tl.reshape(tl.join(c0, c1), [rest, SHARE, 32, 2]), 1)
        c0, c1 = tl.split(both)
        return tl.reshape(c0, [rest * 32]), tl.reshape(c1, [rest * 32])
    else:
        c2, c3 = sums[8] + sums[14], sums[9] + sums[15]
        if SHARE == 1:
            return c0, c1, c2, c3
        both = tl.join(tl.join(c0, c1), tl.join(c2, c3))
        both = tl.sum(tl.reshape(both, [rest, SHARE, 32, 2, 2]), 1)
        even, odd = tl.split(tl.reshape(both, [rest * 32, 2, 2]))
        c0, c1 = tl.split(even)
        c2, c3 = tl.split(odd)
        return c0, c1, c2, c3
