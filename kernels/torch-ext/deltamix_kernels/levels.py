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
    values = [alpha * c + beta * c**3 for c in centred]
    found = torch.tensor(values, dtype=torch.float64, device="cpu")
    rounded = found.float().to(torch.float16 if half else torch.bfloat16)
    return [p & 0xFFFF for p in rounded.view(torch.int16).tolist()]


def _word(values: list[int]) -> int:
    return struct.unpack("<i", bytes(values + [0] * (4 - len(values))))[0]


def words(bits: int, half: bool) -> tuple[int, int, int]:
    """What `lookup` wants in registers."""
    if bits > 4:
        return 0x47000000, _bits(_CUBIC[bits][0]), 0
    levels = _patterns(bits, half)[-8:]  # the upper half, all being symmetric
    return _word([p & 255 for p in levels[:4]]), _word([p >> 8 for p in levels[:4]]), 0x03030303


def _codes(bits: int, planes: list[str], shifts: list[str]) -> str:
    """PTX that merges the planes of element j into t: four codes, one a byte."""
    sizes = [p for p in (8, 4, 2, 1) if bits & p]
    if bits == 8:
        return f"mov.b32 t, {planes[0]}; "
    text = ""
    for i, size in enumerate(sizes):
        to = "n" if i else "t"
        text += f"shr.u32 {to}, {planes[i]}, {shifts[i]}; "
        text += f"and.b32 {to}, {to}, {((1 << size) - 1) * 0x01010101}; "
        if i:
            text += f"mad.lo.u32 t, t, {1 << size}, n; "
    return text


def _found(bits: int, half: bool, codes: str) -> str:
    """PTX: the bytes l and h of the levels of four codes of 3 bits, nibbles of `codes`."""
    levels = _patterns(bits, half)[-4:]
    low, high = _word([p & 255 for p in levels]), _word([p >> 8 for p in levels])
    return f"prmt.b32 l, $4, {low}, {codes}; prmt.b32 h, $5, {high}, {codes}; "


def _bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _float(value: float) -> str:
    return f"0f{_bits(value) & 0xFFFFFFFF:08X}"


def _computed(bits: int, half: bool, first: str, second: str) -> str:
    """PTX: the cubic of the four codes in t. A code is written into the mantissa of 2^15."""
    text = ""
    for i, to in enumerate("lhsn"):
        text += f"prmt.b32 {to}, t, $4, {0x7604 | i << 4}; "
        text += f"add.f32 {to}, {to}, {_float(-(2.0**15) - (2**bits - 1) / 2)}; "
        text += f"mul.f32 m, {to}, {to}; fma.rn.f32 m, m, {_float(_CUBIC[bits][1])}, $5; "
        text += f"mul.f32 {to}, {to}, m; "
    pair = "cvt.rn.f16x2.f32" if half else "cvt.rn.bf16x2.f32"
    return text + f"{pair} {first}, h, l; {pair} {second}, n, s; "


def _of_word(bits: int, half: bool, planes: list[str], shifts: list[str], to: list[str]) -> str:
    """PTX: the levels of four byte columns."""
    zip_up = f"prmt.b32 {to[0]}, l, h, 0x5140; prmt.b32 {to[1]}, l, h, 0x7362; "
    if bits == 2:
        # s = 17·code + 0x40: code c selects byte c, a low one, and c + 4, a high one. As 17 times
        # 0xF4B87C40 is 0x40404040, no instruction takes two constants.
        text = f"shr.u32 t, {planes[0]}, {shifts[0]}; lop3.b32 t, t, $6, 0xF4B87C40, 0xEA; "
        text += f"mul.lo.u32 s, t, 17; prmt.b32 {to[0]}, $4, $5, s; "
        return text + f"shr.u32 s, s, 16; prmt.b32 {to[1]}, $4, $5, s; "
    if bits == 4:
        # n: codes of the upper half; the others are looked up by their mirror's code
        text = f"shr.u32 t, {planes[0]}, {shifts[0]}; shr.u32 n, t, 3; and.b32 n, n, 0x01010101; "
        text += "mul.lo.u32 m, n, 7; xor.b32 t, t, m; not.b32 t, t; and.b32 t, t, 0x07070707; "
        text += "shr.u32 s, t, 4; or.b32 t, t, s; prmt.b32 s, t, 0, 0x4420; "
        text += _found(4, half, "s") + "xor.b32 n, n, 0x01010101; mad.lo.u32 h, n, 128, h; "
        return text + zip_up
    text = _codes(bits, planes, shifts)
    if bits == 1:
        text += "mad.lo.u32 s, t, 17, 0x40404040; "
        text += f"prmt.b32 {to[0]}, $4, $5, s; shr.u32 s, s, 16; prmt.b32 {to[1]}, $4, $5, s; "
        return text
    return text + _computed(bits, half, *to)


def _three(half: bool) -> str:
    """PTX: the levels of eight byte columns of 3 bits, their codes the nibbles of one word."""
    text = ""
    for i, to in enumerate("tn"):
        words, shifts = (f"${7 + 2 * i}", f"${8 + 2 * i}"), (f"${11 + 2 * i}", f"${12 + 2 * i}")
        for word, shift, turned in zip(words, shifts, "lh", strict=True):
            text += f"shf.r.wrap.b32 {turned}, {word}, {word}, {shift}; "
        text += f"lop3.b32 {to}, l, h, 0x0F0F0F0F, 0xE4; "
    text += "and.b32 n, n, 0x11111111; lop3.b32 t, t, n, 0x66666666, 0xEC; "
    for first, second in (("$0", "$2"), ("$1", "$3")):
        text += _found(3, half, "t") + f"prmt.b32 {first}, l, h, 0x6240; "
        text += f"prmt.b32 {second}, l, h, 0x7351; shr.u32 t, t, 16; "
    return text


def lookup(bits: int, half: bool) -> str:
    """PTX: the levels of element j of eight byte columns, four words of 16-bit floats.

    $4 to $6 are `words`. From $7 on are, of each of the planes from the highest on, two words of
    the byte row that holds the element, then come `shifts`.
    """
    if bits == 3:
        text = _three(half)
    else:
        text, count = "", sum(bits >> i & 1 for i in range(4))
        shifts = [f"${7 + 2 * count + i}" for i in range(count if bits < 8 else 0)]
        for word in range(2):
            planes = [f"${7 + 2 * i + word}" for i in range(count)]
            text += _of_word(bits, half, planes, shifts, [f"${2 * word}", f"${2 * word + 1}"])
    return "{ .reg .b32 t, s, n, m, l, h; " + text + "}"


_BFLOAT16 = tl.constexpr([lookup(b, False) for b in range(1, 9)])
_FLOAT16 = tl.constexpr([lookup(b, True) for b in range(1, 9)])
_BFLOAT16_WORDS = tl.constexpr([words(b, False) for b in range(1, 9)])
_FLOAT16_WORDS = tl.constexpr([words(b, True) for b in range(1, 9)])
_OPERANDS = tl.constexpr(["=r,=r,=r,=r" + ",r" * i for i in range(16)])


@triton.jit
def constants(zero, bits: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """What `level_words` wants in registers; `zero`, one a thread, is 0, unknown to the compiler.

    An instruction takes one constant; ptxas would copy a second one to a register each time.
    """
    if not PTX:
        return ()
    if dtype == tl.float16:
        known: tl.constexpr = _FLOAT16_WORDS[bits - 1]
    else:
        known: tl.constexpr = _BFLOAT16_WORDS[bits - 1]
    return zero | known[0], zero | known[1], zero | known[2]


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
    """What `lookup` shifts by to find element j."""
    found = ()
    if bits == 3:
        # to bits 1 and 2 and to bit 0: of low nibbles in the first word, of high ones in the other
        found = (j * 2 % 8 - 1, j * 2 % 8 - 5, j, j - 4)
    elif bits < 8:
        for i in tl.static_range(2, -1, -1):
            if (bits >> i) & 1:
                found = found + (j * (1 << i) % 8,)
    return found


@triton.jit
def level_words(planes, j, fixed, bits: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels in `dtype`, bfloat16 or float16, of element j of eight byte columns, as four words.

    planes: two words of each of the byte rows that hold the element's planes. fixed: `constants`.
    """
    if PTX:
        operands = fixed + planes + shifts(j, bits)
        text: tl.constexpr = _FLOAT16[bits - 1] if dtype == tl.float16 else _BFLOAT16[bits - 1]
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            text, _OPERANDS[len(operands)], operands,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return w0, w1, w2, w3
    else:
        found = ()
        for word in tl.static_range(2):
            some = ()
            for i in tl.static_range(len(planes) // 2):
                some = some + (planes[2 * i + word],)
            v0 = cubic(_code(some, j, 0, bits), bits).to(dtype)
            v1 = cubic(_code(some, j, 1, bits), bits).to(dtype)
            v2 = cubic(_code(some, j, 2, bits), bits).to(dtype)
            v3 = cubic(_code(some, j, 3, bits), bits).to(dtype)
            found = found + (pair(v0, v1), pair(v2, v3))
        return found
