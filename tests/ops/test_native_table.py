"""The native op in a program of its own: by sanitizers, and with fewer instructions.

`python tests/ops/test_native_table.py FILE` writes the table of cases, for compilers and machines
that CI has not: `aarch64-linux-gnu-gcc -static -O2 -ffp-contract=off -I deltamix_hf/ops
tests/ops/native_table.c -lm`, then `qemu-aarch64 a.out FILE`.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from packed_cases import pack

from deltamix_hf.ops import native, native_build

HERE = Path(__file__).parent
SIZES = [(1, 1), (8, 8), (64, 128), (7, 130), (131, 257), (600, 72)]
GROUPS = [(0, 0), (0, 16), (8, 32), (16, 128)]
WIDTHS = [[8, 7, 6, 5, 4, 3, 2, 1], [1], [3, 3, 3], [2] * 40, []]
SANITIZED = ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def write_table(path: Path) -> int:
    """Write every case, see `native_table.c`; returns how many."""
    random, count = torch.Generator().manual_seed(0), 0
    with path.open("wb") as file:
        for m, n in SIZES:
            for groups in GROUPS:
                for widths in WIDTHS:
                    packed, delta = pack(m, n, widths, widths[::-1], groups, gaussian=True)
                    for rows in 1, 4, 13:
                        for kind in "forward", "transposed", "tokens":
                            _write_case(file, packed, delta, rows, kind, random)
                            count += 1
    return count


def _write_case(file, packed, delta, rows, kind, random) -> None:
    entered, factor = packed.n, delta.T
    if kind == "transposed":
        entered, factor = packed.m, delta
    x = torch.randn(rows, entered, generator=random)
    expected = x.double() @ factor
    if kind == "tokens":
        x = torch.randint(packed.m, (rows,), generator=random)
        expected = delta[x]
    bits = [size.bit_length() - 1 if size else 0 for size in packed.group_sizes]
    flat = [number for run in packed.runs for number in run]
    sizes = packed.rank, len(packed.runs), packed.ranks.shape[1], packed.n, packed.m, *bits, rows
    file.write(struct.pack("<11q", *sizes, kind != "forward", kind == "tokens", 0))
    file.write(struct.pack(f"<{len(flat)}i", *flat))
    for tensor in packed.ranks, packed.v, packed.u, x, expected.float():
        file.write(tensor.contiguous().numpy().tobytes())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "table"
    return path, write_table(path)


def run(table, folder, *flags):
    """Build the program and run all cases."""
    path, count = table
    compiler = shutil.which("cc") or pytest.skip("no C compiler here")
    native_flags = ("-march=native",) if os.uname().machine in native_build._X86 else ()
    program, source = folder / "table", HERE / "native_table.c"
    ours = "-std=gnu11", "-ffp-contract=off", *native_flags, *flags
    command = [compiler, *ours, "-I", str(native_build.SOURCE.parent), "-o", str(program)]
    built = subprocess.run([*command, str(source), "-lm"], capture_output=True, text=True)
    if built.returncode and "-fsanitize" in str(flags) and "cannot find" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert not built.returncode, built.stderr
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith(f"{count} cases")


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx2", "-mno-fma"), ()], ids=str)
def test_sanitizers_find_nothing(table, tmp_path, flags):  # -O0: half the time to compile
    x86 = os.uname().machine in native_build._X86
    wide = x86 and "avx512bw" in Path("/proc/cpuinfo").read_text()
    if (flags and not x86) or (not flags and x86 and not wide):
        pytest.skip("flags of x86, or those of a machine without AVX-512, which are the first")
    run(table, tmp_path, *SANITIZED, *flags)


if __name__ == "__main__":
    print(write_table(Path(sys.argv[1])), "cases")
