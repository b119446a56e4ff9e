"""The kernels compile for an H100 on a machine without one.

Triton's interpreter accepts what its compiler does not, so this runs in a process of its own,
without the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
from deltamix_kernels.dequantize import dequantize_kernel
from deltamix_kernels.expand import expand_kernel
from deltamix_kernels.gather import gather_kernel
from deltamix_kernels.grouped import (
    grouped_expand_kernel, grouped_rows_kernel, grouped_shrink_kernel,
)
from deltamix_kernels.shrink import shrink_kernel
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"h": "*fp32", "out": "*fp32", "tiles": "*i32", "zeros": "*u8", "ids": "*i64"}
TYPES |= {"table": "*i64", "addresses": "*i64"}
TYPES |= dict.fromkeys(("order", "starts", "slots", "of_rows"), "*i32")

def build(kernel, dtype, *typed, **constants):
    signature = {}
    for name in kernel.arg_names:
        kind = TYPES.get(name, "i32")
        if name in ("x", "weight", "bias", "y", *typed):
            kind = "*" + dtype
        elif name.startswith("packed"):
            kind = "*u8"
        elif name.startswith("ranks"):
            kind = "*i16"
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and "atom." not in compiled.asm["ptx"]

EVERY = 0b111111110
# every dtype and every grid, not every pair of them: a kernel takes 1.5 s
for dtype, gaussian in (("bf16", True), ("bf16", False), ("fp16", False), ("fp32", True)):
    shared = dict(
        GROUP=0 if gaussian else 128, GAUSSIAN=gaussian, WIDTHS=EVERY,
        ZERO_WIDTHS=0 if gaussian else EVERY, WIDEN=False, M=16, R=16,
    )
    build(shrink_kernel, dtype, SIDE=0, SPLIT=128, C=16, **shared)
    quick = {k: v for k, v in shared.items() if k not in ("WIDEN", "M")}
    build(dequantize_kernel, dtype, "out", SIDE=1, C=16, **quick)
    for base in (False, True):
        build(expand_kernel, dtype, SIDE=1, BASE=base, BIAS=True, C=4, K=128, **shared)
for dtype, group in (("bf16", 0), ("bf16", 128), ("fp32", 0)):
    shared = dict(GROUP=group, M=16, R=16)
    build(grouped_shrink_kernel, dtype, SPLIT=128, C=16, WIDEN=False, **shared)
    build(grouped_expand_kernel, dtype, SIDE=1, BIAS=True, C=4, WIDEN=False, **shared)
    build(grouped_rows_kernel, dtype, **shared)
    build(gather_kernel, dtype, "base", "out", BLOCK=1024)
build(grouped_expand_kernel, "bf16", SIDE=0, BIAS=False, C=4, WIDEN=False, GROUP=0, M=16, R=16)
print("compiled")
"""


def test_kernels_compile_for_an_h100(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compiled here, not remembered
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr
