"""Levels of the Gaussian codebook, four codes at a time.

A level of up to 4 bits is looked up by byte permutation (PRMT): the low and the high bytes of all
levels lie in registers, and the codes of four byte columns select among them. Wider levels, and
all of them in Triton's interpreter, are computed by the cubic.
"""

import struct

import torch
import triton
import triton.language as tl

from .decode import cubic

_CUBIC = (None, (1.5957691, 0.0), (0.892898, 0.0506908), (0.471466, 0.0115843))
_CUBIC += ((0.240515, 0.00209738),)


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


def _shifted(to: str, source: str, shift: int, mask: int) -> str:
    """PTX that puts a field of each of the four bytes of `source` into `to`."""
    if shift:
        return f"shr.u32 {to}, {source}, {shift}; and.b32 {to}, {to}, {mask * 0x01010101}; "
    return f"and.b32 {to}, {source}, {mask * 0x01010101}; "


# t: four codes of up to 3 bits, one a byte; s: the same as four nibbles, which PRMT selects by
_NIBBLES = "shr.u32 s, t, 4; or.b32 t, t, s; prmt.b32 s, t, 0, 0x4420; "
_FIND = "prmt.b32 l, l0, l1, s; prmt.b32 h, h0, h1, s; "
_ZIP = "prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; "


def lookup(bits: int, j: int, half: bool) -> str:
    """PTX: levels of element j of four byte columns, two words of 16-bit floats.

    Of 1, 2 and 4 bits $2 is the byte row that holds the element, of 3 bits $2 and $3 are those of
    its 2-bit and its 1-bit plane.
    """
    if bits <= 2:
        # low bytes in l0, high bytes in h0: code c selects byte c and byte c + 4
        text = _shifted("t", "$2", j * bits % 8, (1 << bits) - 1)
        text += "mad.lo.u32 s, t, 17, 0x40404040; " + _words(_patterns(bits, half))
        text += "prmt.b32 $0, l0, h0, s; shr.u32 s, s, 16; prmt.b32 $1, l0, h0, s; "
    elif bits == 3:
        text = _shifted("t", "$2", 2 * j % 8, 3) + _shifted("n", "$3", j, 1)
        text += "mad.lo.u32 t, t, 2, n; "
        text += _NIBBLES + _words(_patterns(3, half)) + _FIND + _ZIP
    else:
        # the levels are symmetric: look up the upper half and put the sign bit on
        text = _shifted("t", "$2", 4 * j % 8, 15)
        text += "not.b32 n, t; and.b32 n, n, 0x08080808; shr.u32 m, n, 3; sub.u32 m, n, m; "
        text += "xor.b32 t, t, m; and.b32 t, t, 0x07070707; " + _NIBBLES
        text += _words(_patterns(4, half)[8:]) + _FIND + "mad.lo.u32 h, n, 16, h; " + _ZIP
    return "{ .reg .b32 t, s, n, m, l, h, l0, l1, h0, h1; " + text + "}"


def merge(bits: int, j: int) -> str:
    """PTX: codes of 5 to 7 bits of element j of four byte columns, one a byte; $1, $2 and at 7
    bits $3 are the byte rows of its planes."""
    text, rest = "mov.b32 s, 0; ", bits
    for i, plane in enumerate(p for p in (4, 2, 1) if bits & p):
        rest -= plane
        text += _shifted("t", f"${i + 1}", plane * j % 8, (1 << plane) - 1)
        text += f"shl.b32 t, t, {rest}; or.b32 s, s, t; "
    return "{ .reg .b32 s, t; " + text + "mov.b32 $0, s; }"


# of element j at width b: [8·(b - 1) + j], from 5 bits [8·(b - 5) + j]
_MERGES = tl.constexpr([merge(b, j) for b in range(5, 8) for j in range(8)])
_BFLOAT16 = tl.constexpr([lookup(b, j, False) for b in range(1, 5) for j in range(8)])
_FLOAT16 = tl.constexpr([lookup(b, j, True) for b in range(1, 5) for j in range(8)])


@triton.jit
def byte_rows(at, row_stride, mask, bits: tl.constexpr):
    """The `bits` byte rows of each rank at `at`, the first one's addresses, as a tuple of uint8."""
    rows = ()
    for i in tl.static_range(bits):
        rows = rows + (tl.load(at + i * row_stride, mask=mask, other=0),)  # noqa: RUF005
    return rows


@triton.jit
def element(rows, j: tl.constexpr, bits: tl.constexpr):
    """Codes int32 of element j of the byte columns whose `byte_rows` these are."""
    code = tl.zeros(rows[0].shape, tl.int32)
    if bits & 8:
        code = rows[j].to(tl.int32)
    if bits & 4:
        code = (code << 4) | ((rows[(bits & 8) + j // 2].to(tl.int32) >> (4 * (j % 2))) & 15)
    if bits & 2:
        code = (code << 2) | ((rows[(bits & 12) + j // 4].to(tl.int32) >> (2 * (j % 4))) & 3)
    if bits & 1:
        code = (code << 1) | ((rows[bits & 14].to(tl.int32) >> j) & 1)
    return code


@triton.jit
def level(rows, j: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr, LOOKUP: tl.constexpr):
    """Levels in `dtype`, bfloat16 or float16, of element j of the byte columns."""
    if (not LOOKUP) or bits == 8:
        return cubic(element(rows, j, bits), bits).to(dtype)
    elif bits == 7:
        code = tl.inline_asm_elementwise(
            _MERGES[16 + j], "=r,r,r,r", [rows[j // 2], rows[4 + j // 4], rows[6]],
            dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
        return cubic(code.to(tl.int32), bits).to(dtype)
    elif bits > 4:
        code = tl.inline_asm_elementwise(
            _MERGES[8 * bits - 40 + j], "=r,r,r", [rows[j // 2], rows[4 + (bits - 5) * j // 4]],
            dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
        return cubic(code.to(tl.int32), bits).to(dtype)
    else:
        if dtype == tl.float16:
            text: tl.constexpr = _FLOAT16[8 * bits - 8 + j]
        else:
            text: tl.constexpr = _BFLOAT16[8 * bits - 8 + j]
        if bits == 3:
            found = tl.inline_asm_elementwise(
                text, "=r,=r,r,r", [rows[j // 4], rows[2]], dtype=tl.int16, is_pure=True, pack=4
            )
        else:
            found = tl.inline_asm_elementwise(
                text, "=r,=r,r", [rows[j * bits // 8]], dtype=tl.int16, is_pure=True, pack=4
            )
        return found.to(dtype, bitcast=True)
