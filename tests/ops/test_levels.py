"""The PTX of the levels, by an emulation of the few instructions it consists of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltamix_kernels import levels
from deltamix_kernels.prepack import unpack_codes

from deltamix_hf.quantization.gaussian import levels as codebook_levels

WORD = 0xFFFFFFFF


def prmt(a, b, selector):
    pool = [(x >> 8 * i) & 255 for x in (a, b) for i in range(4)]
    nibbles = [(selector >> 4 * i) & 15 for i in range(4)]
    assert all(n < 8 for n in nibbles)  # 8 and above replicate a sign, which nothing here wants
    return sum(pool[n] << 8 * i for i, n in enumerate(nibbles))


def real(word):
    return np.array([word], np.uint32).view(np.float32)[0]


def word(value):
    return int(np.array([value], np.float32).view(np.uint32)[0])


def rounded(high, low, dtype):
    pair = torch.tensor([real(low), real(high)]).to(dtype).view(torch.int16)
    return (int(pair[0]) & 0xFFFF) | (int(pair[1]) & 0xFFFF) << 16


def lop3(a, b, c, table):
    """Bit by bit, the entry of the table that the three bits select."""
    bits = [(table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1))) & 1 for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


OPERATIONS = {
    "mov": lambda a: a,
    "shr": lambda a, b: a >> b,
    "shf": lambda a, b, c: ((b << 32 | a) >> c % 32) & WORD,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a & WORD,
    "mad": lambda a, b, c: (a * b + c) & WORD,
    "prmt": prmt,
    "lop3": lop3,
    "add": lambda a, b: word(real(a) + real(b)),
    "mul.f32": lambda a, b: word(real(a) * real(b)),
    "mul.lo": lambda a, b: (a * b) & WORD,
    "fma": lambda a, b, c: word(float(real(a)) * float(real(b)) + float(real(c))),
    "cvt.rn.bf16x2": lambda a, b: rounded(a, b, torch.bfloat16),
    "cvt.rn.f16x2": lambda a, b: rounded(a, b, torch.float16),
}


def constant(text):
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0) & WORD


def run(text, registers):
    """The registers after the PTX `text`."""
    registers = dict(registers)
    for line in text.strip("{ }").split(";"):
        operation, _, arguments = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *sources = (a.strip() for a in arguments.split(","))
        values = [registers[s] if s in registers else constant(s) for s in sources]
        name = operation.removesuffix(".f32") if operation[:3] == "cvt" else operation.split(".")[0]
        if name == "mul":
            name = ".".join(operation.split(".")[:2])
        registers[target] = OPERATIONS[name](*values)
    return registers


def random_rows(bits):
    """Byte rows of eight byte columns as two words, and the codes [column, element]."""
    packed = torch.randint(256, (1, bits, 8), dtype=torch.uint8)
    rows = [[sum(int(b) << 8 * i for i, b in enumerate(row[w : w + 4])) for w in (0, 4)]
            for row in packed[0]]  # fmt: skip
    return rows, unpack_codes(packed, bits)[0]


def inputs_of(bits, j, rows, half):
    """Operands of `lookup`: the byte rows that hold the planes of element j, then its shifts."""
    words, places, above = [], [], 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            words += rows[above + j * plane // 8]
            places.append(j * plane % 8)
            above += plane
    if bits == 3:
        places = [places[0] - 1, places[0] - 5, places[1], places[1] - 4]
    values = [w & WORD for w in levels.words(bits, half)] + words + places
    return {f"${4 + i}": value for i, value in enumerate(values)}


@pytest.mark.untraced
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_lookup_finds_the_rounded_levels(bits, half):
    torch.manual_seed(bits)
    dtype = torch.float16 if half else torch.bfloat16
    wanted = codebook_levels(bits)
    # computed levels may round to the neighbour where the cubic lies in the middle
    most = 0 if bits <= 4 else torch.finfo(dtype).eps
    for _ in range(200 if bits <= 4 else 20):
        rows, codes = random_rows(bits)
        for j in range(8):
            after = run(levels.lookup(bits, half), inputs_of(bits, j, rows, half))
            got = [(after[f"${i // 2}"] >> 16 * (i % 2)) & 0xFFFF for i in range(8)]
            found = torch.tensor(got, dtype=torch.int32).to(torch.int16).view(dtype)
            expected = wanted[codes[:, j].long()].to(dtype)
            assert ((found - expected).abs() <= most * expected.abs()).all()
