"""Count what the decode kernels' machine code does, without a GPU.

    python kernels/benchmarks/sass.py [--capability 90] [--rows 1] [--bits 2 3 4 8]

Compiles each kernel for one width at a time by the host code that launches it, disassembles it with
Triton's own nvdisasm, and prints: registers, bytes of stack (spills), bytes of code, instructions
outside of the loop that unpacks codes and in it, shared memory accesses and barriers in it, bytes
of its narrowest load, and instructions a weight and lane. The fused kernel's other loop, of the
base product, has a line of its own. Then, over a Llama-3-8B layer:
warp instructions a byte of codes, every instruction counted as often as a warp meets it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from compile_only import launches
from decode_gpu import groups, random_packed
from deltamix_kernels import Packed
from deltamix_kernels.decode_plan import DecodePlan
from deltamix_kernels.prepack import padded, width_counts

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
OPERATION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")
LABEL = re.compile(r"^(\.L_x?_?\d+):")
META = torch.device("meta")


class Counts(NamedTuple):
    registers: int
    stack: int
    code: int  # bytes
    straight: int  # instructions outside of the loops
    loop: int
    shared: int  # accesses to shared memory in the loop, and barriers
    load: int  # bytes a lane of the narrowest load in the loop


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [f"{TOOLS}/{name}", *arguments], capture_output=True, text=True, check=True
    ).stdout


def count(kernel: Any) -> list[Counts]:
    """Of each loop of a compiled kernel that has tensor core instructions, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "-res-usage", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    operations, labels = [], {}
    for line in text.splitlines():
        if found := LABEL.match(line.strip()):
            labels[found[1]] = len(operations)
        if (found := OPERATION.match(line)) and found[2] != "NOP":
            operations.append((found[2], found[3]))
    loops = []
    for i, (name, rest) in enumerate(operations):
        target = re.search(r"`\(([^)]+)\)", rest)
        if name.startswith("BRA") and target and labels.get(target[1], i) < i:
            loop = [name for name, _ in operations[labels[target[1]] : i + 1]]
            if any(name.startswith("HMMA") for name in loop):
                loops.append(loop)
    straight = len(operations) - sum(map(len, loops))
    return [
        Counts(
            registers, stack, 16 * len(operations), straight, len(loop),
            sum(name.startswith(("LDS", "STS", "BAR", "LDSM", "SHFL")) for name in loop),
            min(int((re.search(r"\.(64|128)$", name) or ["", "32"])[1]) // 8
                for name in loop if name.startswith("LDG")),
        )
        for loop in loops
    ]  # fmt: skip


def kernel_counts(bits: int, rows: int, capability: int) -> dict[str, Counts]:
    """Of "shrink", "expand", "fused" and its "base" at one width."""
    layout = ((512, bits, bits),)
    v = torch.empty(512 * bits, 512, dtype=torch.uint8, device=META)
    ranks = torch.empty(512, 3, dtype=torch.int16, device=META)
    plan = DecodePlan([Packed(v, v, ranks, None, layout, 4096, 4096, (0, 0))], torch.bfloat16)
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device=META)
    with launches(capability) as found:
        plan.shrink(x)
        plan.expand([x])
        plan.fused(x, [torch.empty(4096, 4096, dtype=torch.bfloat16, device=META)], [x])
    shrink, expand, fused = (count(kernel) for _, kernel, _ in found)
    return {"shrink": shrink[0], "expand": expand[0], "fused": fused[1], "base": fused[0]}


def layer(counts: dict[int, dict[str, Counts]]) -> dict[str, float]:
    """Warp instructions a byte of codes of each kernel over a layer; of fused without the base."""
    found, sizes = dict.fromkeys(("shrink", "expand", "fused"), 0), {"shrink": 0, "expand": 0}
    for some in groups():
        plan = DecodePlan([random_packed(linear, META) for linear in some], torch.bfloat16)
        sizes["shrink"] += plan.v.numel()
        sizes["expand"] += plan.u.numel()
        s, e, f = plan.shrink_tiles, plan.expand_tiles, plan.fused_tiles
        for _, _, _, bits in plan._v_tiles():
            c = counts[bits]["shrink"]
            steps = -(-plan.columns // (64 * s.share * s.unroll))
            found["shrink"] += 8 * s.share * (c.straight + steps * c.loop)
        for p in plan.matrices:
            few = {"expand": 0, "fused": 0}  # instructions of a warp
            for bits, ranks in width_counts(p.runs).items():
                for kernel, step in (
                    ("expand", 64 * e.share * e.unroll), ("fused", 64 * f.warps),
                ):  # fmt: skip
                    c = counts[bits][kernel]
                    few[kernel] += -(-padded(ranks) // step) * c.loop
            few["expand"] += counts[2]["expand"].straight
            found["expand"] += -(-p.m // 64) * 8 * e.share * few["expand"]
            found["fused"] += -(-p.m // 8) * f.warps * few["fused"]  # a column at a time
    sizes["fused"] = sizes["expand"]
    return {kernel: found[kernel] / sizes[kernel] for kernel in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    options = parser.parse_args()
    counts = {}
    print(f"sm_{options.capability}, Triton {triton.__version__}, {options.rows} rows")
    print("kernel bits registers stack code straight loop shared load lane-instr/weight")
    tiles = DecodePlan.__dataclass_fields__
    unroll = {k: tiles[f"{k}_tiles"].default_factory().unroll for k in ("shrink", "expand")}
    for bits in options.bits:
        counts[bits] = kernel_counts(bits, options.rows, options.capability)
        for kernel, c in counts[bits].items():
            weights = 8 * tiles["fused_tiles"].default_factory().unroll
            if kernel != "base":
                weights = 16 * unroll.get(kernel, 1)
            print(kernel, bits, *c, f"{c.loop / weights:.2f}", flush=True)
    if {2, 3, 4, 8} <= set(counts):
        for kernel, every in layer(counts).items():
            print(f"{kernel}: {every:.3f} warp instructions a byte of codes")


if __name__ == "__main__":
    main()
