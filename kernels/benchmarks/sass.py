"""Count what the decode kernels' machine code does, without a GPU.

    python kernels/benchmarks/sass.py [--capability 90] [--rows 1]

Compiles each kernel for each width by the host code that launches it, disassembles it with
Triton's own nvdisasm, and prints: registers, bytes of stack (spills), shared memory, and of the
loop that unpacks codes: barriers, bytes of the widest and of the narrowest asynchronous copy, and
instructions a weight and lane. Then, over a Llama-3-8B layer: warp instructions a byte of codes,
in the loops and in all (every instruction outside of loops counts once).
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

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
OPERATION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")
LABEL = re.compile(r"^(\.L_x?_?\d+):")
META = torch.device("meta")


class Counts(NamedTuple):
    registers: int
    stack: int
    shared: int
    straight: int  # instructions outside of the loop
    loop: int
    barriers: int  # in the loop, of more than one warp
    copies: tuple[int, ...]  # bytes of the loop's asynchronous copies, without repetition
    step: int  # weights of one pass of the loop and warp


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [f"{TOOLS}/{name}", *arguments], capture_output=True, text=True, check=True
    ).stdout


def count(kernel: Any, step: int) -> Counts:
    """Of a compiled kernel with one unpacking loop."""
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
        if found := OPERATION.match(line):
            operations.append((found[2], found[3]))
    loops = []
    for i, (name, rest) in enumerate(operations):
        target = re.search(r"`\(([^)]+)\)", rest)
        if name.startswith("BRA") and target and labels.get(target[1], i) < i:
            loops.append(operations[labels[target[1]] : i + 1])
    loop = max(loops, key=len)
    copies = {
        int(found[1] or 32) // 8
        for name, _ in loop
        if (found := re.match(r"LDGSTS\.E(?:\.BYPASS)?(?:\.LTC128B)?(?:\.(\d+))?", name))
    }
    several = kernel.metadata.num_warps > 1
    # With one warp, Triton's barriers are warp-wide: they hold nobody up.
    barriers = sum(name.startswith("BAR.SYNC") for name, _ in loop) if several else 0
    straight = sum(not name.startswith("NOP") for name, _ in operations) - len(loop)
    return Counts(
        registers, stack, kernel.metadata.shared, straight, len(loop), barriers,
        tuple(sorted(copies)), step,
    )  # fmt: skip


def kernel_counts(bits: int, rows: int, capability: int) -> dict[str, Counts]:
    """Of "shrink" and "expand" at one width."""
    layout = ((512, bits, bits),)
    v = torch.empty(512 * bits, 512, dtype=torch.uint8, device=META)
    ranks = torch.empty(512, 3, dtype=torch.int16, device=META)
    plan = DecodePlan([Packed(v, v, ranks, None, layout, 4096, 4096, (0, 0))], torch.bfloat16)
    s, e = plan.shrink_tiles, plan.expand_tiles
    with launches(capability) as found:
        plan.shrink(torch.empty(rows, 4096, dtype=torch.bfloat16, device=META))
        plan.expand([torch.empty(rows, 4096, dtype=torch.bfloat16, device=META)])
    steps = (s.R * s.C * 8, e.R * e.C * 8)
    return {
        name: count(kernel, step)
        for name, (_, kernel, _), step in zip(("shrink", "expand"), found, steps, strict=True)
    }


def layer(counts: dict[int, dict[str, Counts]]) -> dict[str, tuple[float, float]]:
    """Warp instructions a byte of codes of each kernel over a layer, in loops and in all."""
    loops, every, size = dict.fromkeys(("shrink", "expand"), 0), {"shrink": 0, "expand": 0}, {}
    for some in groups():
        plan = DecodePlan([random_packed(linear, META) for linear in some], torch.bfloat16)
        s, e = plan.shrink_tiles, plan.expand_tiles
        for kernel, bytes_of in (("shrink", plan.v.numel()), ("expand", plan.u.numel())):
            size[kernel] = size.get(kernel, 0) + bytes_of
        work = [("shrink", row[3], plan.columns // s.splits, s.C, s.S, s.splits)
                for row in plan._shrink_rows()]  # fmt: skip
        work += [("expand", row[3], row[2] * 16, e.R, e.S, 1) for row in plan._expand_rows()]
        for kernel, bits, length, block, warps, programs in work:
            found = counts[bits][kernel]
            steps = -(-length // (block * warps))
            loops[kernel] += programs * warps * steps * found.loop
            every[kernel] += programs * warps * (steps * found.loop + found.straight)
    return {kernel: (loops[kernel] / size[kernel], every[kernel] / size[kernel]) for kernel in size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--rows", type=int, default=1)
    options = parser.parse_args()
    counts = {}
    print(f"sm_{options.capability}, Triton {triton.__version__}, {options.rows} rows")
    print("kernel bits registers stack shared straight loop barriers copies lane-instr/weight")
    for bits in range(1, 9):
        counts[bits] = kernel_counts(bits, options.rows, options.capability)
        for kernel, c in counts[bits].items():
            lane = c.loop * 32 / c.step
            print(f"{kernel} {bits} {' '.join(map(str, c[:6]))} {c.copies} {lane:.2f}", flush=True)
    for kernel, (loops, every) in layer(counts).items():
        print(f"{kernel}: warp instructions a byte {loops:.3f} in loops, {every:.3f} in all")


if __name__ == "__main__":
    main()
