"""The kernels compile for an H100 on a machine without one.

Triton's interpreter accepts what its compiler does not, so this runs in a process of its own,
without the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.untraced

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
SCRIPT = """
import torch
from compile_only import launches, meta_packed
from deltamix_kernels import DecodePlan, Packed, dequantize, gather, grouped_embed
from deltamix_kernels.grouped_launch import Rows, Table
from sass import USUAL, grouped_launches, linear_launches
from shapes import Linear

LINEAR = Linear("any", 72, 136, "")
EVERY = 0b111111110
with launches(90) as found:
    packed = meta_packed(LINEAR, [(3, b, b) for b in USUAL])
    linear_launches(DecodePlan([packed], torch.float16), 16)  # test_sass.py: bfloat16, 1 row
    grouped_launches(LINEAR, EVERY, 3)
    integers = torch.empty(3, dtype=torch.int32, device="meta")
    rows = Rows(integers, torch.empty(4, dtype=torch.int32, device="meta"), integers)
    table = Table(8, 72, 136, torch.device("meta"), embedding=True)
    y = torch.empty(3, 136, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(3, dtype=torch.int64, device="meta")
    for table.group in (0, 16):
        grouped_embed(y, ids, table, rows)
    gather(y[0], ids, integers)
    for dtype, group in ((torch.bfloat16, 0), (torch.float32, 128)):
        dequantize(meta_packed(LINEAR, [(20, 3, 4)])._replace(group_sizes=(group, group)), 1, dtype)
for name, kernel, _ in found:
    assert kernel.asm["cubin"] and "atom." not in kernel.asm["ptx"], name
print(*sorted({name for name, _, _ in found}))
"""
NAMES = (
    "decode_expand_kernel decode_fused_kernel decode_shrink_kernel dequantize_kernel "
    "gather_kernel grouped_expand_kernel grouped_rows_kernel grouped_shrink_kernel\n"
)


def test_kernels_compile_for_an_h100(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compiled here, not remembered
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == NAMES, done.stderr
