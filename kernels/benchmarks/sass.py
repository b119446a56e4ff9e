"""Count what the decode kernels' machine code does, without a GPU.

    python kernels/benchmarks/sass.py [--capability 80 90 100] [--rows 1] [--bits 2 3 4 8]

Compiles each kernel for one width at a time by the host code that launches it, disassembles it with
Triton's own nvdisasm, and prints: registers, bytes of stack (spills) and of shared memory, barriers
and accesses to shared memory in loops, bytes a lane of the loops' narrowest load, and instructions
a weight and lane of the loop that has whole steps and of the one that makes the rest.

Then, over a Llama-3-8B layer, warp instructions a byte of codes (every instruction outside of the
loops counted once a warp, whatever branch it is in, so no more than this), and the variants that a
model compiles.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from compile_only import launches, meta_packed
from deltamix_kernels.decode_plan import DecodePlan
from deltamix_kernels.grouped_launch import Rows, Table, grouped_add
from deltamix_kernels.layout import widths_mask
from deltamix_kernels.prepack import padded, width_counts
from shapes import Linear, groups
from torch import Tensor

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
OPERATION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")
LABEL = re.compile(r"^(\.L_x?_?\d+):")
SHARED = "LDS", "STS", "BAR", "LDSM", "SHFL", "ATOMS"
USUAL = 2, 3, 4, 8
SQUARE = Linear("square", 4096, 4096, "")


class Loop(NamedTuple):
    """An innermost loop with tensor core instructions."""

    instructions: int
    steps: int  # of 16 terms a lane
    shared: int  # accesses to shared memory and barriers
    load: int  # bytes a lane of its narrowest load from global memory

    @property
    def weight(self) -> float:
        """Instructions a weight and lane."""
        return self.instructions / (16 * self.steps)


class Counts(NamedTuple):
    """Of a compiled kernel."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes
    straight: int  # instructions outside of `loops`
    loops: list[Loop]  # in their order


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [f"{TOOLS}/{name}", *arguments], capture_output=True, text=True, check=True
    ).stdout


def count(kernel: Any, rows: int) -> Counts:
    """Counts of Triton's compiled kernel; `rows` of x."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    operations, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(operations)
        if (operation := OPERATION.match(line)) and operation[2] != "NOP":
            operations.append((operation[2], operation[3]))
    spans = []
    for end, (name, rest) in enumerate(operations):
        target = re.search(r"`\(([^)]+)\)", rest)
        if name.startswith("BRA") and target and labels.get(target[1], end) < end:
            spans.append((labels[target[1]], end + 1))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [
        loop for s in sorted(inner) if (loop := _loop([o for o, _ in operations[slice(*s)]], rows))
    ]
    straight = len(operations) - sum(loop.instructions for loop in loops)
    return Counts(*map(int, found.groups()), straight, loops)


def _loop(names: list[str], rows: int) -> Loop | None:
    products = sum(name.startswith("HMMA") for name in names)
    if not products:
        return None
    loads = [name for name in names if name.startswith("LDG")]
    widths = [int((re.search(r"\.(64|128)\b", name) or ["", "32"])[1]) // 8 for name in loads]
    shared = sum(name.startswith(SHARED) for name in names)
    return Loop(len(names), products // (4 if rows <= 8 else 8), shared, min(widths))


def linear_launches(plan: DecodePlan, rows: int) -> None:
    """The launches of one plan: shrink, expand and fused."""
    dtype, device = plan.dtype, "meta"
    x = torch.empty(rows, plan.n, dtype=dtype, device=device)
    ys = [torch.empty(rows, m, dtype=dtype, device=device) for m in plan.lengths]
    h = plan.shrink(x)
    plan.expand(h, ys)
    if rows <= 16:
        ws = [torch.empty(m, plan.n, dtype=dtype, device=device) for m in plan.lengths]
        plan.fused(h, x, ws, ys)


def grouped_launches(linear: Linear, widths: int, rows: int) -> None:
    """The launches of `rows` rows with many deltas: grouped shrink and expand."""
    table = Table(8, linear.m, linear.n, torch.device("meta"))
    table.widths = widths
    order, starts, slots = (_integers(n) for n in (rows, rows + 1, rows))
    x = torch.empty(rows, linear.n, dtype=torch.bfloat16, device="meta")
    y = torch.empty(rows, linear.m, dtype=torch.bfloat16, device="meta")
    grouped_add(y, x, table, Rows(order, starts, slots))


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device="meta")


def kernel_counts(bits: tuple[int, ...], rows: int, capability: int) -> dict[str, Counts]:
    """Of "shrink", "expand", "fused", "grouped_shrink", "grouped_expand" for a set of widths."""
    packed = meta_packed(SQUARE, [(64, b, b) for b in bits])
    with launches(capability) as found:
        plan = DecodePlan([packed], torch.bfloat16)
        plan.codes.widths = widths_mask(bits)
        linear_launches(plan, rows)
        grouped_launches(SQUARE, widths_mask(bits), rows)
    names = [name.removeprefix("decode_").removesuffix("_kernel") for name, _, _ in found]
    return dict(zip(names, (count(kernel, rows) for _, kernel, _ in found), strict=True))


def decode_loops(kernel: str, counts: Counts) -> list[Loop]:
    """Those that unpack codes: of each width one of whole steps, then one of the rest."""
    return counts.loops[2:] if kernel == "fused" else counts.loops  # the base's come first


def _passes(units: int, loops: tuple[Loop, Loop], step: int) -> int:
    """Instructions of a warp in the loops, over `units` of 16 terms, `step` of them a step."""
    whole, rest = divmod(units, step * loops[0].steps)
    return whole * loops[0].instructions + -(-rest // step) * loops[1].instructions


def layer(capability: int, rows: int = 1) -> dict[str, float]:
    """Warp instructions a byte of codes over a Llama-3-8B layer."""
    single = {b: kernel_counts((b,), rows, capability)["shrink"] for b in USUAL}
    every = kernel_counts(USUAL, rows, capability)
    found, sizes = dict.fromkeys(("shrink", "expand", "fused"), 0), dict.fromkeys("vu", 0)
    for some in groups("Llama-3-8B"):
        with launches(capability):
            plan = DecodePlan([meta_packed(linear) for linear in some], torch.bfloat16)
        fused = plan.tiles["8" if rows <= 8 else "16"]["fused"]
        share = fused["WARPS"] // fused["COLUMNS"]
        for linear in some:
            packed = meta_packed(linear)
            sizes["v"] += packed.v.numel()
            sizes["u"] += packed.u.numel()
            for ranks, bits, _ in packed.runs:
                c = single[bits]
                warp = c.straight + _passes(padded(-(-linear.n // 8)) // 16, tuple(c.loops), 4)
                found["shrink"] += -(-ranks // 8) * 8 * warp
            units = {b: padded(n) // 16 for b, n in width_counts(packed.runs).items()}
            for kernel, warps, programs, step in (
                ("expand", 8, -(-linear.m // 64), 4),
                ("fused", share, -(-linear.m // 8), 4 * share),
            ):
                loops = decode_loops(kernel, every[kernel])
                pairs = {b: (loops[2 * i], loops[2 * i + 1]) for i, b in enumerate(USUAL)}
                warp = sum(_passes(n, pairs[b], step) for b, n in units.items())
                if kernel == "expand":
                    warp += every[kernel].straight
                found[kernel] += programs * warps * warp
    found["fused, loops"] = found.pop("fused")
    codes = {"shrink": sizes["v"]}
    return {k: n / codes.get(k, sizes["u"]) for k, n in found.items()}


def variants(rows: int, capability: int = 90) -> set[tuple[str, str]]:
    """(kernel, hash) of all that a Llama-3-8B model compiles to decode so many rows.

    With one delta for them all, and with many.
    """
    seen = set()
    with launches(capability) as found:
        for some in groups("Llama-3-8B"):
            plan = DecodePlan([meta_packed(linear) for linear in some], torch.bfloat16)
            linear_launches(plan, rows)
            for linear in some:
                grouped_launches(linear, plan.codes.widths, rows)
    for name, kernel, _ in found:
        seen.add((name, kernel.hash))
    return seen


def lines(rows: int, bits: list[int], capability: int) -> Iterator[str]:
    for b in bits:
        for kernel, c in kernel_counts((b,), rows, capability).items():
            loops = decode_loops(kernel, c)
            yield (
                f"{kernel} {b} {c.registers} {c.stack} {c.shared} "
                f"{sum(loop.shared for loop in c.loops)} {min(loop.load for loop in loops)} "
                + " ".join(f"{loop.weight:.2f}" for loop in loops)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=list(USUAL))
    options = parser.parse_args()
    for capability in options.capability:
        print(f"sm_{capability}, Triton {triton.__version__}, {options.rows} rows")
        print("kernel bits registers stack shared barriers load, lane-instr/weight: whole rest")
        for line in lines(options.rows, options.bits, capability):
            print(line, flush=True)
        for kernel, most in layer(capability, options.rows).items():
            print(f"{kernel}: {most:.3f} warp instructions a byte of codes")
    for rows in (1, 16, 40):
        names = sorted(name for name, _ in variants(rows))
        print(f"{len(names)} variants at {rows} rows: {' '.join(names)}")


if __name__ == "__main__":
    main()
