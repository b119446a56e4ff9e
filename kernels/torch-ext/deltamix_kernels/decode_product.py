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
# by what is masked, and how many 16 bytes ahead
_LOAD = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4 + AHEAD];"
_MASK = "{ .reg .pred p; setp.ne.b32 p, $5, 0; ZERO@p " + _LOAD + " }"
_ZERO = "".join(f"mov.b32 ${i}, 0; " for i in range(4))
_LOADS = tl.constexpr(
    [
        [text.replace("AHEAD", str(16 * i)) for i in range(256)]
        for text in (_LOAD, _MASK.replace("ZERO", ""), _MASK.replace("ZERO", _ZERO))
    ]
)


@triton.jit
def lanes(WARPS: tl.constexpr):
    """(warp, g, t) of every thread."""
    i = tl.arange(0, 32 * WARPS)
    return i // 32, i % 32 // 4, i % 4


@triton.jit
def four(at, mask=None, ONCE: tl.constexpr = False):
    """Four words from each address on, an int32 pointer to 16 aligned bytes; 0 where masked.

    ONCE: leave the L1 cache to others.
    """
    words = at[:, None] + tl.arange(0, 4)[None, :]
    if mask is None:
        both = tl.load(words, cache_modifier=".cg" if ONCE else "")
    else:
        both = tl.load(words, mask=mask[:, None], other=0, cache_modifier=".cg" if ONCE else "")
    even, odd = tl.split(tl.reshape(both, [at.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load(address, ahead: tl.constexpr, mask, ZERO: tl.constexpr, PTX: tl.constexpr):
    """Four words from 16·ahead bytes after each address int64 on. mask may be None: everywhere.

    Where masked, zeros or (not ZERO) any words: Triton's load would take instructions to write
    zeros, and LLVM one more pointer for each distance.
    """
    if not PTX:
        return four(address.to(tl.pointer_type(tl.int32)) + ahead * 4, mask)
    if mask is None:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _LOADS[0][ahead], "=r,=r,=r,=r,l", [address],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        return w0, w1, w2, w3
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _LOADS[2 if ZERO else 1][ahead], "=r,=r,=r,=r,l,r", [address, mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        return w0, w1, w2, w3


@triton.jit
def _addresses(pointers, PTX: tl.constexpr):
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
def _advanced(addresses, units: tl.constexpr):
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
def together(first, loads, rows):
    """`first`, but known only when all the loads (tuples of words) are there.

    Otherwise ptxas moves each load to where it is needed and one latency follows the other.
    """
    any_of = first
    for i in tl.static_range(len(loads)):
        for w in tl.static_range(0, len(loads[i]), 4):
            any_of = any_of | loads[i][w]
    return first | (any_of & (rows >> 31))  # rows, an argument, is no negative number


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
def _masked(masks, also):
    """Every one of a tuple of masks, and `also`."""
    found = ()
    for i in tl.static_range(len(masks)):
        found = found + (masks[i] & also,)
    return found


@triton.jit
def _step(
    rows, inputs, ahead: tl.constexpr, live, inside, ZERO: tl.constexpr, FIRST: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Words of the step so many units of 16 terms ahead: two halves of inputs, the planes' codes.

    Any codes if not `inside` (None: surely), any inputs, or ZERO, of tokens not `live`. FIRST:
    codes before inputs. ptxas keeps the order of loads, and at times puts others' use between.
    """
    codes, given = (), ()
    for order in tl.static_range(2):
        if (order == 0) == FIRST:
            for i in tl.static_range(len(rows)):
                codes = codes + load(rows[i], ahead, inside, False, PTX)
        else:
            for half in tl.static_range(2):
                for i in tl.static_range(len(inputs)):
                    given = given + load(inputs[i], 2 * ahead + half, live[i], ZERO, PTX)
    return given + codes


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
    """sums + the product of all terms."""
    rows = byte_rows(codes + first * 4, plane, j, bits)
    fixed = constants((token + tokens) >> 31, bits, dtype, PTX)
    to, live = (), ()
    for i in tl.static_range(len(inputs)):
        to = to + (inputs[i] + first * 8,)
        live = live + (token + 8 * i < tokens,)
    rows, to = _addresses(rows, PTX), _addresses(to, PTX)
    some: tl.constexpr = STEP * UNROLL
    whole = length // some * some
    if UNROLL == 1:
        for start in range(0, whole, some):
            here = _masked(live, first * 0 + start < length)  # as below for the order of loads
            step = _step(rows, to, 0, here, None, False, False, PTX)
            sums = _sums(sums, step, j, fixed, bits, dtype, TOKENS, PTX)
            rows, to = _advanced(rows, some), _advanced(to, 2 * some)
    else:
        # One half of the steps is loaded while the other is multiplied.
        half: tl.constexpr = UNROLL // 2
        more, loads = first * 0 < whole, ()
        for u in tl.static_range(half):
            loads += _step(rows, to, u * STEP, _masked(live, more), more, False, True, PTX)
        for start in range(some, whole + 1, some):
            more, later, following = first * 0 + start < whole, (), ()
            for u in tl.static_range(half, UNROLL):
                later += _step(rows, to, u * STEP, live, None, False, True, PTX)
            sums = _sums(sums, loads, j, fixed, bits, dtype, TOKENS, PTX)
            rows, to = _advanced(rows, some), _advanced(to, 2 * some)
            for u in tl.static_range(half):
                following += _step(rows, to, u * STEP, _masked(live, more), more, False, True, PTX)
            sums = _sums(sums, later, j, fixed, bits, dtype, TOKENS, PTX)
            loads = following
    for start in range(whole, length, STEP):
        within = start + first < length
        last = _step(rows, to, 0, _masked(live, within), within, True, False, PTX)
        sums = _sums(sums, last, j, fixed, bits, dtype, TOKENS, PTX)
        rows, to = _advanced(rows, STEP), _advanced(to, 2 * STEP)
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
