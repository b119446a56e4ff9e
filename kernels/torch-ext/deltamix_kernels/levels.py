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
    return struct.unpack("<I", bytes(values + [0] * (4 - len(values))))[0]


def _words(patterns: list[int]) -> str:
    """PTX that puts the low bytes of up to 8 levels into l0, l1 and the high ones into h0, h1."""
    low, high = [p & 255 for p in patterns], [p >> 8 for p in patterns]
    parts = {"l0": low[:4], "l1": low[4:], "h0": high[:4], "h1": high[4:]}
    return "".join(f"mov.b32 {name}, {_word(part)}; " for name, part in parts.items())


def _codes(bits: int) -> str:
    """PTX that merges the planes of element j into t: four codes, one a byte.

    $2 and on are the byte rows that hold the planes, then come the planes' shifts.
    """
    planes = [p for p in (8, 4, 2, 1) if bits & p]
    if bits == 8:
        return "mov.b32 t, $2; "
    text = ""
    for i, plane in enumerate(planes):
        to = "n" if i else "t"
        text += f"shr.u32 {to}, ${2 + i}, ${2 + len(planes) + i}; "
        text += f"and.b32 {to}, {to}, {((1 << plane) - 1) * 0x01010101}; "
        if i:
            text += f"mad.lo.u32 t, t, {1 << plane}, n; "
    return text


# four codes of up to 3 bits, one a byte, as four nibbles, which PRMT selects by
_NIBBLES = "shr.u32 s, t, 4; or.b32 t, t, s; prmt.b32 s, t, 0, 0x4420; "
_FIND = "prmt.b32 l, l0, l1, s; prmt.b32 h, h0, h1, s; "
_ZIP = "prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; "


def _float(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _computed(bits: int, half: bool) -> str:
    """PTX: the cubic of the four codes in t. A code is written into the mantissa of 2^23."""
    alpha, beta = map(_float, _CUBIC[bits])
    text = ""
    for i, to in enumerate("lhsn"):
        text += f"prmt.b32 {to}, t, 0x4B000000, {0x7650 + i}; "
        text += f"add.f32 {to}, {to}, {_float(-(2.0**23))}; "
        text += f"add.f32 {to}, {to}, {_float(-(2**bits - 1) / 2)}; "
        text += f"mul.f32 m, {to}, {to}; fma.rn.f32 m, m, {beta}, {alpha}; "
        text += f"mul.f32 {to}, {to}, m; "
    pair = "cvt.rn.f16x2.f32" if half else "cvt.rn.bf16x2.f32"
    return text + f"{pair} $0, h, l; {pair} $1, n, s; "


def lookup(bits: int, half: bool) -> str:
    """PTX: the levels of element j of four byte columns, two words of 16-bit floats.

    $2 and on are the byte rows that hold the element's planes, the highest plane first, then come
    the shifts of the element in each of them; 8 bits have no shift.
    """
    text = _codes(bits)
    if bits <= 2:
        # low bytes in l0, high bytes in h0: code c selects byte c and byte c + 4
        text += "mad.lo.u32 s, t, 17, 0x40404040; " + _words(_patterns(bits, half))
        text += "prmt.b32 $0, l0, h0, s; shr.u32 s, s, 16; prmt.b32 $1, l0, h0, s; "
    elif bits == 3:
        text += _NIBBLES + _words(_patterns(3, half)) + _FIND + _ZIP
    elif bits == 4:
        # the levels are symmetric: look up the upper half and put the sign bit on
        text += "not.b32 n, t; and.b32 n, n, 0x08080808; shr.u32 m, n, 3; sub.u32 m, n, m; "
        text += "xor.b32 t, t, m; and.b32 t, t, 0x07070707; " + _NIBBLES
        text += _words(_patterns(4, half)[8:]) + _FIND + "mad.lo.u32 h, n, 16, h; " + _ZIP
    else:
        text += _computed(bits, half)
    return "{ .reg .b32 t, s, n, m, l, h, l0, l1, h0, h1; " + text + "}"


_BFLOAT16 = tl.constexpr([lookup(b, False) for b in range(1, 9)])
_FLOAT16 = tl.constexpr([lookup(b, True) for b in range(1, 9)])


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
def level_pairs(planes, j, bits: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels in `dtype`, bfloat16 or float16, of element j of four byte columns, as two words.

    planes: the words of the byte rows that hold the element's planes.
    """
    if PTX:
        if dtype == tl.float16:
            text: tl.constexpr = _FLOAT16[bits - 1]
        else:
            text: tl.constexpr = _BFLOAT16[bits - 1]
        if bits == 8:
            return tl.inline_asm_elementwise(
                text, "=r,=r,r", [planes[0]], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        elif bits == 7:
            return tl.inline_asm_elementwise(
                text, "=r,=r,r,r,r,r,r,r",
                [planes[0], planes[1], planes[2], j * 4 % 8, j * 2 % 8, j],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        elif bits == 6 or bits == 5 or bits == 3:
            high: tl.constexpr = 4 if bits & 4 else 2
            return tl.inline_asm_elementwise(
                text, "=r,=r,r,r,r,r",
                [planes[0], planes[1], j * high % 8, j * (bits - high) % 8],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                text, "=r,=r,r,r", [planes[0], j * bits % 8],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        v0 = cubic(_code(planes, j, 0, bits), bits).to(dtype)
        v1 = cubic(_code(planes, j, 1, bits), bits).to(dtype)
        v2 = cubic(_code(planes, j, 2, bits), bits).to(dtype)
        v3 = cubic(_code(planes, j, 3, bits), bits).to(dtype)
        return pair(v0, v1), pair(v2, v3)
