"""The byte-permutation look-ups, by an emulation of the few PTX instructions they consist of."""

from __future__ import annotations

import random

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


OPERATIONS = {
    "mov": lambda a: a,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: (a << b) & WORD,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a & WORD,
    "sub": lambda a, b: (a - b) & WORD,
    "mad": lambda a, b, c: (a * b + c) & WORD,
    "prmt": prmt,
}


def run(text, registers):
    """The registers after the PTX `text`."""
    registers = dict(registers)
    for line in text.strip("{ }").split(";"):
        operation, _, arguments = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *sources = (a.strip() for a in arguments.split(","))
        values = [registers[s] if s in registers else int(s, 0) & WORD for s in sources]
        registers[target] = OPERATIONS[operation.split(".")[0]](*values)
    return registers


def random_rows(bits):
    """Byte rows of four byte columns as words, and the codes [column, element]."""
    packed = torch.tensor([[[random.getrandbits(8) for _ in range(4)] for _ in range(bits)]])
    words = [sum(int(b) << 8 * i for i, b in enumerate(row)) for row in packed[0]]
    return words, unpack_codes(packed.to(torch.uint8), bits)[0]


def rows_of(bits, j):
    """The byte rows that hold the planes of element j."""
    found, above = [], 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            found.append(above + j * plane // 8)
            above += plane
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_lookup_finds_the_rounded_levels(bits, half):
    random.seed(bits)
    dtype = torch.float16 if half else torch.bfloat16
    wanted = codebook_levels(bits).to(dtype).view(torch.int16)
    for _ in range(200):
        words, codes = random_rows(bits)
        for j in range(8):
            inputs = {f"${2 + i}": words[row] for i, row in enumerate(rows_of(bits, j))}
            after = run(levels.lookup(bits, j, half), inputs)
            got = [(after[f"${i // 2}"] >> 16 * (i % 2)) & 0xFFFF for i in range(4)]
            assert got == [int(wanted[c]) & 0xFFFF for c in codes[:, j].tolist()]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_planes_are_merged(bits):
    random.seed(bits)
    for _ in range(200):
        words, codes = random_rows(bits)
        for j in range(8):
            inputs = {f"${1 + i}": words[row] for i, row in enumerate(rows_of(bits, j))}
            got = run(levels.merge(bits, j), inputs)["$0"]
            assert [(got >> 8 * i) & 255 for i in range(4)] == codes[:, j].tolist()
