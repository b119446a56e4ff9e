"""The PTX of the levels, by an emulation of the few instructions it consists of."""

from __future__ import annotations

import random

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


OPERATIONS = {
    "mov": lambda a: a,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a & WORD,
    "sub": lambda a, b: (a - b) & WORD,
    "mad": lambda a, b, c: (a * b + c) & WORD,
    "prmt": prmt,
    "add": lambda a, b: word(real(a) + real(b)),
    "mul": lambda a, b: word(real(a) * real(b)),
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
        registers[target] = OPERATIONS[name](*values)
    return registers


def random_rows(bits):
    """Byte rows of four byte columns as words, and the codes [column, element]."""
    packed = torch.tensor([[[random.getrandbits(8) for _ in range(4)] for _ in range(bits)]])
    words = [sum(int(b) << 8 * i for i, b in enumerate(row)) for row in packed[0]]
    return words, unpack_codes(packed.to(torch.uint8), bits)[0]


def inputs_of(bits, j, words):
    """Operands of `lookup`: the byte rows that hold the planes of element j, then its shifts."""
    rows, shifts, above = [], [], 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            rows.append(words[above + j * plane // 8])
            shifts.append(j * plane % 8)
            above += plane
    return {f"${2 + i}": value for i, value in enumerate(rows + shifts)}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_lookup_finds_the_rounded_levels(bits, half):
    random.seed(bits)
    dtype = torch.float16 if half else torch.bfloat16
    wanted = codebook_levels(bits)
    # computed levels may round to the neighbour where the cubic lies in the middle
    most = 0 if bits <= 4 else torch.finfo(dtype).eps
    for _ in range(200 if bits <= 4 else 20):
        words, codes = random_rows(bits)
        for j in range(8):
            after = run(levels.lookup(bits, half), inputs_of(bits, j, words))
            got = [(after[f"${i // 2}"] >> 16 * (i % 2)) & 0xFFFF for i in range(4)]
            found = torch.tensor(got, dtype=torch.int32).to(torch.int16).view(dtype)
            expected = wanted[codes[:, j].long()].to(dtype)
            assert ((found - expected).abs() <= most * expected.abs()).all()
