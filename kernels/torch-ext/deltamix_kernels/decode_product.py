"""Products of packed codes by single tensor core instructions, with operands only in registers.

Every tensor here has one element a thread. Lane 4g + t of a warp holds, of mma.m16n8k16: of the
first operand token g (and g + 8), of the second its column g, and of the result token g (g + 8),
columns 2t and 2t + 1. A sum's terms may come in any order as long as both operands have the same:
a lane takes four neighbouring ones, where the instruction means 2t, 2t + 1, 2t + 8 and 2t + 9. So a
word of codes, four byte columns of one element, becomes the second operand of one instruction, and
nothing passes through shared memory.
"""

import triton
import triton.language as tl

from .levels import level_pairs

_TYPES = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
_EIGHT = (
    "{{ .reg .b32 z; .reg .f32 d, e, f; mov.b32 z, 0; mov.f32 f, 0f00000000; "
    + _TYPES
    + "{{$0, $1, d, e}}, {{$2, z, $3, z}}, {{$4, $5}}, {{$6, $7, f, f}}; }}"
)
_SIXTEEN = _TYPES + "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
_EIGHTS = tl.constexpr([_EIGHT.format(t) for t in ("bf16", "f16")])
_SIXTEENS = tl.constexpr([_SIXTEEN.format(t) for t in ("bf16", "f16")])


@triton.jit
def lanes(WARPS: tl.constexpr):
    """(warp, g, t) of every thread."""
    i = tl.arange(0, 32 * WARPS)
    return i // 32, i % 32 // 4, i % 4


@triton.jit
def four(at, mask):
    """Four words from each address on, an int32 pointer to 16 aligned bytes; 0 where masked."""
    both = tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(both, [at.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def eight(at, mask):
    """Eight words from each address on."""
    w0, w1, w2, w3 = four(at, mask)
    w4, w5, w6, w7 = four(at + 4, mask)
    return w0, w1, w2, w3, w4, w5, w6, w7


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
def mma(sums, a0, a1, a2, a3, b0, b1, dtype: tl.constexpr, TOKENS: tl.constexpr, PTX: tl.constexpr):
    """sums + the product of sixteen terms; TOKENS 8 leaves a1, a3 and the last two sums out.

    a0, a2: the words of token g, a1, a3: of token g + 8; b0, b1: of column g.
    """
    if not PTX:
        b = _operand(b0, b1, dtype)
        c0, c1 = _product((sums[0], sums[1]), _operand(a0, a2, dtype), b)
        if TOKENS == 8:
            return c0, c1, sums[2], sums[3]
        else:
            c2, c3 = _product((sums[2], sums[3]), _operand(a1, a3, dtype), b)
            return c0, c1, c2, c3
    elif TOKENS == 8:
        text: tl.constexpr = _EIGHTS[0] if dtype == tl.bfloat16 else _EIGHTS[1]
        c0, c1 = tl.inline_asm_elementwise(
            text, "=f,=f,r,r,r,r,f,f", [a0, a2, b0, b1, sums[0], sums[1]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        return c0, c1, sums[2], sums[3]
    else:
        text: tl.constexpr = _SIXTEENS[0] if dtype == tl.bfloat16 else _SIXTEENS[1]
        return tl.inline_asm_elementwise(
            text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


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
def byte_rows(at, plane, j, mask, bits: tl.constexpr):
    """Of 16 byte columns, the byte rows that hold element j, as a tuple of four words a plane."""
    if bits == 8:
        return (four(at + j * plane, mask),)
    elif bits == 7:
        return (
            four(at + j // 2 * plane, mask),
            four(at + (4 + j // 4) * plane, mask),
            four(at + 6 * plane, mask),
        )
    elif bits == 6:
        return four(at + j // 2 * plane, mask), four(at + (4 + j // 4) * plane, mask)
    elif bits == 5:
        return four(at + j // 2 * plane, mask), four(at + 4 * plane, mask)
    elif bits == 4:
        return (four(at + j // 2 * plane, mask),)
    elif bits == 3:
        return four(at + j // 4 * plane, mask), four(at + 2 * plane, mask)
    elif bits == 2:
        return (four(at + j // 4 * plane, mask),)
    else:
        return (four(at, mask),)


@triton.jit
def multiply(
    sums,  # four float32 a thread, see `mma`
    codes,  # int32 pointers: first byte row of this thread's column of the product
    plane,  # words from one byte row to the next
    inputs,  # int32 pointers: first input of token g
    eighth,  # words from token g to token g + 8
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
    c0, c1, c2, c3 = sums
    live, live8 = token < tokens, token + 8 < tokens
    for start in range(0, length, STEP * UNROLL):
        rows, given, given8, loads = (), (), (), ()
        for u in tl.static_range(UNROLL):
            at = start + u * STEP + first
            inside = at < length
            rows = rows + (byte_rows(codes + at * 4, plane, j, inside, bits),)
            given = given + (eight(inputs + at * 8, inside & live),)
            loads = loads + rows[u] + (given[u],)
            if TOKENS == 16:
                given8 = given8 + (eight(inputs + eighth + at * 8, inside & live8),)
                loads = loads + (given8[u],)
            else:
                given8 = given8 + (given[u],)
        for u in tl.static_range(UNROLL):
            for w in tl.static_range(4):
                if bits == 7:
                    planes = (rows[u][0][w], rows[u][1][w], rows[u][2][w])
                elif bits == 6 or bits == 5 or bits == 3:
                    planes = (rows[u][0][w], rows[u][1][w])
                else:
                    planes = (rows[u][0][w],)
                if UNROLL > 1 and u + w == 0:
                    head = (together(planes[0], loads, tokens),)
                    for i in tl.static_range(1, len(planes)):
                        head = head + (planes[i],)
                    planes = head
                b0, b1 = level_pairs(planes, j, bits, dtype, PTX)
                c0, c1, c2, c3 = mma(
                    (c0, c1, c2, c3), given[u][2 * w], given8[u][2 * w],
                    given[u][2 * w + 1], given8[u][2 * w + 1], b0, b1, dtype, TOKENS, PTX,
                )  # fmt: skip
    return c0, c1, c2, c3


@triton.jit
def over_warps(sums, TOKENS: tl.constexpr, SHARE: tl.constexpr):
    """`sums` added up over groups of SHARE neighbouring warps, one element a thread of the rest."""
    if SHARE == 1:
        return sums
    else:
        rest: tl.constexpr = sums[0].shape[0] // 32 // SHARE
        if TOKENS == 8:
            both = tl.reshape(tl.join(sums[0], sums[1]), [rest, SHARE, 32, 2])
            c0, c1 = tl.split(tl.sum(both, 1))
            c0, c1 = tl.reshape(c0, [rest * 32]), tl.reshape(c1, [rest * 32])
            return c0, c1, c0, c1
        else:
            both = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
            both = tl.sum(tl.reshape(both, [rest, SHARE, 32, 2, 2]), 1)
            even, odd = tl.split(tl.reshape(both, [rest * 32, 2, 2]))
            c0, c1 = tl.split(even)
            c2, c3 = tl.split(odd)
            return c0, c1, c2, c3
