"""Levels of the Gaussian codebook as operands of a tensor core, four codes at a time.

A lane has the byte rows of four neighbouring byte columns as words, and the element j that it
wants of each. Up to 4 bits its levels are looked up by byte permutation (PRMT): the low and the
high bytes of all levels lie in registers, and the codes select among them. Wider levels are
computed by the cubic, as all of them are in Triton's interpreter, which knows no PTX.
"""

import struct

import torch
import triton
import triton.language as tl

from .decode import cubic

_CUBIC = (None, (1.5957691, 0.0), (0.892898, 0.0506908), (0.471466, 0.0115843))
_CUBIC += ((0.240515, 0.00209738), (0.121831, 3.36750e-4), (0.0617039, 5.08628e-5))
_CUBIC += ((0.0312720, 7.40792e-6), (0.0158606, 1.05197e-6))


def _patterns(bits: int, half: bool) -> list[int]:
    """The levels of one width as bit patterns of float16 (`half`) or bfloat16."""
    alpha, beta = _CUBIC[bits]
    centred = [code - (2**bits - 1) / 2 for code in range(2**bits)]
    found = torch.tensor([alpha * c + beta * c**3 for c in centred], dtype=torch.float64)
    rounded = found.float().to(torch.float16 if half else torch.bfloat16)
    return [p & 0xFFFF for p in rounded.view(torch.int16).tolist()]


def _word(values: list[int]) -> int:
    return struct.unpack("<i", bytes(values + [0] * (4 - len(values))))[0]


def words(bits: int, half: bool) -> tuple[int, int]:
    """The two words that `lookup` wants in registers."""
    if bits > 4:
        return 0x47000000, _bits(_CUBIC[bits][0])
    levels = _patterns(bits, half)[-8:]  # the upper half, all being symmetric
    return _word([p & 255 for p in levels[:4]]), _word([p >> 8 for p in levels[:4]])


def _others(bits: int, half: bool) -> tuple[int, int]:
    """Of more than four levels the low and the high bytes of the others."""
    levels = _patterns(bits, half)[-4:]
    return _word([p & 255 for p in levels]), _word([p >> 8 for p in levels])


def _codes(bits: int) -> str:
    """PTX that merges the planes of element j into t: four codes, one a byte.

    $4 and on are the byte rows that hold the planes, then come the planes' shifts.
    """
    planes = [p for p in (8, 4, 2, 1) if bits & p]
    if bits == 8:
        return "mov.b32 t, $4; "
    text = ""
    for i, plane in enumerate(planes):
        to = "n" if i else "t"
        text += f"shr.u32 {to}, ${4 + i}, ${4 + len(planes) + i}; "
        text += f"and.b32 {to}, {to}, {((1 << plane) - 1) * 0x01010101}; "
        if i:
            text += f"mad.lo.u32 t, t, {1 << plane}, n; "
    return text


def _found(bits: int, half: bool) -> str:
    """PTX: the bytes l and h of the levels of four codes of 3 bits, one a byte, in t."""
    low, high = _others(bits, half)
    # the codes as the nibbles that PRMT selects by
    text = "shr.u32 s, t, 4; or.b32 t, t, s; prmt.b32 s, t, 0, 0x4420; "
    return text + f"prmt.b32 l, $2, {low}, s; prmt.b32 h, $3, {high}, s; "


_ZIP = "prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; "


def _bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _float(value: float) -> str:
    return f"0f{_bits(value) & 0xFFFFFFFF:08X}"


def _computed(bits: int, half: bool) -> str:
    """PTX: the cubic of the four codes in t. A code is written into the mantissa of 2^15."""
    text = ""
    for i, to in enumerate("lhsn"):
        text += f"prmt.b32 {to}, t, $2, {0x7604 | i << 4}; "
        text += f"add.f32 {to}, {to}, {_float(-(2.0**15) - (2**bits - 1) / 2)}; "
        text += f"mul.f32 m, {to}, {to}; fma.rn.f32 m, m, {_float(_CUBIC[bits][1])}, $3; "
        text += f"mul.f32 {to}, {to}, m; "
    pair = "cvt.rn.f16x2.f32" if half else "cvt.rn.bf16x2.f32"
    return text + f"{pair} $0, h, l; {pair} $1, n, s; "


def lookup(bits: int, half: bool) -> str:
    """PTX: the levels of element j of four byte columns, two words of 16-bit floats.

    $2 and $3 are `words`. From $4 on are the byte rows that hold the element's planes, the highest
    plane first, then come the shifts of the element in each of them; 8 bits have no shift.
    """
    if bits == 4:
        # n: codes of the upper half; the others are looked up by their mirror's code
        text = "shr.u32 t, $4, $5; shr.u32 n, t, 3; and.b32 n, n, 0x01010101; "
        text += "mul.lo.u32 m, n, 7; xor.b32 t, t, m; not.b32 t, t; and.b32 t, t, 0x07070707; "
        text += _found(4, half)
        text += "xor.b32 n, n, 0x01010101; mad.lo.u32 h, n, 128, h; " + _ZIP
    else:
        text = _codes(bits)
        if bits <= 2:
            # low bytes in $2, high bytes in $3: code c selects byte c and byte c + 4
            text += "mad.lo.u32 s, t, 17, 0x40404040; "
            text += "prmt.b32 $0, $2, $3, s; shr.u32 s, s, 16; prmt.b32 $1, $2, $3, s; "
        elif bits == 3:
            text += _found(3, half) + _ZIP
        else:
            text += _computed(bits, half)
    return "{ .reg .b32 t, s, n, m, l, h; " + text + "}"


_BFLOAT16 = tl.constexpr([lookup(b, False) for b in range(1, 9)])
_FLOAT16 = tl.constexpr([lookup(b, True) for b in range(1, 9)])
_BFLOAT16_WORDS = tl.constexpr([words(b, False) for b in range(1, 9)])
_FLOAT16_WORDS = tl.constexpr([words(b, True) for b in range(1, 9)])
_OPERANDS = tl.constexpr(["=r,=r,r,r" + ",r" * i for i in range(7)])


@triton.jit
def constants(zero, bits: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """What `level_pairs` wants in registers; `zero`, one a thread, is 0, unknown to the compiler.

    An instruction takes one constant; ptxas would copy a second one to a register each time.
    """
    if not PTX:
        return ()
    elif dtype == tl.float16:
        return zero | _FLOAT16_WORDS[bits - 1][0], zero | _FLOAT16_WORDS[bits - 1][1]
    else:
        return zero | _BFLOAT16_WORDS[bits - 1][0], zero | _BFLOAT16_WORDS[bits - 1][1]


@triton.jit
def pair(low, high):
    """Two 16-bit floats as a word int32."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _code(planes, j, byte: tl.constexpr, bits: tl.constexpr):
    """Codes int32 of element j of one of the four byte columns."""
    if bits == 8:
        return (planes[0] >> (8 * byte)) & 255
    code = tl.zeros(j.shape, tl.int32)
    if bits & 4:
        code = (planes[0] >> (8 * byte + j * 4 % 8)) & 15
    if bits & 2:
        code = (code << 2) | ((planes[bits // 4] >> (8 * byte + j * 2 % 8)) & 3)
    if bits & 1:
        code = (code << 1) | ((planes[bits // 4 + bits // 2 % 2] >> (8 * byte + j)) & 1)
    return code


@triton.jit
def shifts(j, bits: tl.constexpr):
    """Where element j lies in the byte rows of a width's planes."""
    found = ()
    for i in tl.static_range(2, -1, -1):
        if (bits >> i) & 1:
            found = found + (j * (1 << i) % 8,)
    return found


@triton.jit
def level_pairs(planes, j, fixed, bits: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels in `dtype`, bfloat16 or float16, of element j of four byte columns, as two words.

    planes: the words of the byte rows that hold the element's planes. fixed: see `constants`.
    """
    if PTX:
        operands = fixed + planes + shifts(j, bits)
        text: tl.constexpr = _FLOAT16[bits - 1] if dtype == tl.float16 else _BFLOAT16[bits - 1]
        return tl.inline_asm_elementwise(
            text, _OPERANDS[len(operands) - 2], operands,
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        v0 = cubic(_code(planes, j, 0, bits), bits).to(dtype)
        v1 = cubic(_code(planes, j, 1, bits), bits).to(dtype)
        v2 = cubic(_code(planes, j, 2, bits), bits).to(dtype)
        v3 = cubic(_code(planes, j, 3, bits), bits).to(dtype)
        return pair(v0, v1), pair(v2, v3)
