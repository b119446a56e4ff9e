"""Check, then time, the decode kernels one by one on the layers of a Llama-3-8B block, on a GPU.

    python kernels/benchmarks/decode_gpu.py [kernels | ncu | launches] [--rows 1 4 16]

`kernels` compares each kernel with float64, launched dependent as well, then times it; `ncu` prints
what Nsight Compute says of six launches, which `launches` makes. One JSON line a result; nothing is
timed that is wrong. TRITON_INTERPRET=1 runs all on a CPU with a small model; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import last_lines, tell
from deltamix_kernels import INTERPRETED, DecodePlan, dequantize
from factors import TINY, exact, groups, kernel_form, layer_factors, poisoned, random_packed
from shapes import Linear
from timing import DEVICE, spread, time_graph
from torch import Tensor

from deltamix_hf.quantization import uniform

CPU = DEVICE.type == "cpu"
GROUPS = groups(TINY)[:2] if INTERPRETED else groups()
SETS = 1 if CPU else 4  # of codes that take turns: 27 MB each against an L2 cache of 50 MB
BASE_SETS = 1 if CPU else 2  # of base weights: 436 MB each
LOOPS = 4  # of a graph over all sets
DTYPE = torch.bfloat16
# Of the norm. A GPU rounds to bfloat16, the interpreter truncates.
TOLERANCE = 2e-2 if CPU else 1e-2
Launch = Callable[[], list[Tensor]]


class Group:
    """The layers of one input: plans whose codes take turns, base weights, and what is right."""

    def __init__(self, linears: list[Linear]):
        self.name = linears[0].reads
        self.factors = [layer_factors(linear, DEVICE, i) for i, linear in enumerate(linears)]
        self.packed = [
            [kernel_form(factors) for factors in self.factors],
            *[[random_packed(linear, DEVICE, 9 * s) for linear in linears] for s in range(1, SETS)],
        ]
        self.plans = [DecodePlan(packed, DTYPE) for packed in self.packed]
        self.weights = [
            [torch.randn(f.m, f.n, device=DEVICE, dtype=DTYPE) / f.n**0.5 for f in self.factors]
            for _ in range(BASE_SETS)
        ]
        self._right: dict[int, tuple[Tensor, ...]] = {}

    def outputs(self, rows: int) -> list[Tensor]:
        x = self.right(rows)[0]
        return [x.new_empty(rows, f.m) for f in self.factors]

    def bytes(self, kernel: str) -> int:
        """Codes and base weights that one of the timed launches reads."""
        codes, base = self.plans[0].codes, sum(2 * w.numel() for w in self.weights[0])
        v, u = codes.v.numel(), codes.u.numel()
        return {"shrink": v, "expand": u, "fused": u + base, "linear": v + u + base}.get(
            kernel, base
        )

    def right(self, rows: int) -> tuple[Tensor, ...]:
        """x, and in float64 h, the deltas' and the base's outputs, layers side by side."""
        if rows not in self._right:
            x = torch.randn(rows, self.plans[0].n, device=DEVICE, dtype=DTYPE)
            h, delta, base = [], [], []
            for factors, w in zip(self.factors, self.weights[0], strict=True):
                scales = uniform.scales_from_bits(factors.ranks[:, 2].contiguous()).double()
                h.append(x.double() @ factors.right().double().T * scales)
                delta.append(exact(factors, x))
                base.append(x.double() @ w.double().T)
            self._right[rows] = x, torch.cat(h, 1), torch.cat(delta, 1), torch.cat(base, 1)
        return self._right[rows]

    def launches(self, rows: int) -> dict[str, tuple[Launch, Tensor]]:
        """Launches of the first plan by name, and what they should give."""
        plan, weights = self.plans[0], self.weights[0]
        x, h_right, delta, base = self.right(rows)
        h = plan.shrink(x)
        added = [y.to(DTYPE) for y in base.split(plan.lengths, 1)]

        def shrink() -> list[Tensor]:
            found = plan.shrink(x)[:, plan.codes.slots.long()]
            ranks = h_right.shape[1]  # all other slots must be zeros
            return [found[:, :ranks] + found[:, ranks:].abs().sum()]

        def expand(add: bool, dependent: bool = False) -> list[Tensor]:
            ys = [y.clone() for y in added] if add else self.outputs(rows)
            plan.expand(plan.shrink(x, True) if dependent else h, ys, add, dependent)
            return ys

        def fused(delta: bool, dependent: bool = False) -> list[Tensor]:
            ys = self.outputs(rows)
            given = plan.shrink(x, True) if dependent else h
            plan.fused(given, x, weights, ys, None, dependent, delta)
            return ys

        found: dict[str, tuple[Launch, Tensor]] = {
            "shrink": (shrink, h_right),
            "expand": (partial(expand, False), delta),
            "expand, added": (partial(expand, True), base + delta),
            "fused": (partial(fused, True), base + delta),
            "base alone": (partial(fused, False), base),
        }
        if plan.dependent:
            found["expand, dependent"] = partial(expand, True, True), base + delta
            found["fused, dependent"] = partial(fused, True, True), base + delta
        return found

    def timed(self, rows: int) -> dict[str, Callable[[int], object]]:
        """What is timed, by name; the argument says whose turn it is."""
        x, plans = self.right(rows)[0], self.plans
        h, ys = plans[0].shrink(x), self.outputs(rows)

        def weights(i: int) -> list[Tensor]:
            return self.weights[i % BASE_SETS]

        return {
            "shrink": lambda i: plans[i].shrink(x),
            "expand": lambda i: plans[i].expand(h, ys),
            "fused": lambda i: plans[i].fused(h, x, weights(i), ys),
            "base alone": lambda i: plans[i].fused(h, x, weights(i), ys, delta=False),
            "vendor's base": lambda i: [F.linear(x, w) for w in weights(i)],
            "linear": lambda i: plans[i].linear(x, weights(i), [None] * len(ys)),
        }

    def errors(self, rows: int, kernel: str = "") -> Iterator[tuple[str, float]]:
        """Of every launch, or a kernel's, of the norm of what is right; infinite if runs differ."""
        for name, (run, right) in self.launches(rows).items():
            if not name.startswith(kernel):
                continue
            with poisoned():
                found, again = torch.cat(run(), 1), torch.cat(run(), 1)
            error = float((found.double() - right).norm() / right.norm())
            yield name, error if torch.equal(found, again) and error == error else float("inf")

    def worst(self, rows: int, kernel: str) -> float:
        return max(error for _, error in self.errors(rows, kernel))

    def dequantized(self, i: int) -> list[Tensor]:
        return [dequantize(p, side, DTYPE) for p in self.packed[i] for side in (0, 1)]

    def worst_dequantized(self) -> float:
        right = [t for f in self.factors for t in (f.right(), f.left())]
        return max(
            float((found.float() - r).norm() / r.norm())
            for found, r in zip(self.dequantized(0), right, strict=True)
        )


CHAIN = 2 if CPU else 24  # layers of `chain`
REPLAYS = 1 if CPU else 50


def chain(group: Group, rows: int) -> Iterator[bool]:
    """Whether layers that each read what the one before wrote give the same bits each time.

    In one CUDA graph of dependent launches, replayed with fresh inputs, against launches that wait
    for each other: a kernel that began before its input was there would differ.
    """
    start = torch.empty(rows, group.plans[0].n, device=DEVICE, dtype=DTYPE)

    def run(dependent: bool) -> Tensor:
        x = start
        for i in range(CHAIN):
            plan = group.plans[i % SETS]
            now, plan.dependent = plan.dependent, dependent and plan.dependent
            x = plan.linear(x, group.weights[i % BASE_SETS], [None])[0]
            plan.dependent = now
            if i % 3 == 2:  # others' kernels in between, at times
                x = x / x.abs().mean()
        return x

    run(True)
    if CPU:
        graph, found = None, start
    else:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(True)
    for _ in range(REPLAYS):
        start.normal_()
        right = run(False)
        if graph is None:
            found = run(True)
        else:
            graph.replay()
        yield torch.equal(found, right) and not found.isnan().any()


def part_kernels(rows_list: list[int]) -> None:
    """Check and time every group at each number of rows."""
    made = [*map(Group, GROUPS)]
    for rows in rows_list:
        good = [*chain(made[1], rows)] if rows <= 16 else [True]
        tell(part="kernels", rows=rows, chain=f"{sum(good)} of {len(good)}", ok=all(good))
    for rows in rows_list:
        layer: dict[str, float] = {}
        for group in made:
            where = {"group": group.name, "rows": rows}
            try:
                errors = dict(group.errors(rows))
                good = max(errors.values()) <= TOLERANCE
                shown = {name: float(f"{error:.2g}") for name, error in errors.items()}
                tell(part="kernels", **where, ok=good, errors=shown)
                if not good:
                    continue
                for kernel, run in group.timed(rows).items():
                    found = time_graph(run, SETS, LOOPS)
                    middle = statistics.median(found)
                    rate = round(group.bytes(kernel) / middle / 1e9)
                    tell(part="kernels", **where, kernel=kernel, **spread(found), GBps=rate)
                    layer[kernel] = layer.get(kernel, 0) + 1e6 * middle
            except Exception as error:
                tell(part="kernels", **where, ok=False, error=last_lines(error))
        tell(part="kernels", rows=rows, layer_us={k: round(us, 2) for k, us in layer.items()})


SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "InstructionStats")
KEPT = re.compile(
    r"gpu__time_duration\.sum|dram__(throughput|bytes_read)|gpu__compute_memory_throughput|"
    r"sm__throughput|sm__warps_active|launch__(registers_per|waves|occupancy_limit)|"
    r"smsp__average_warps_issue_stalled_.*per_issue_active|(smsp__|sm__)inst_executed\.sum$"
)


def part_ncu(rows_list: list[int]) -> None:
    """Print one line a launch; a missing or refused profiler is no failure."""
    places = [*Path("/").glob("usr/local/cuda*/bin/ncu"), *Path("/opt/nvidia").glob("*/*/ncu")]
    ncu = shutil.which("ncu") or next(map(str, places), None)
    if ncu is None:
        return tell(part="ncu", skipped="no ncu")
    command = [ncu, "--csv", "--page", "raw", "--profile-from-start", "off"]
    command += ["--clock-control", "none", *(a for s in SECTIONS for a in ("--section", s))]
    command += [sys.executable, __file__, "launches", "--rows", str(rows_list[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return tell(part="ncu", skipped=(done.stdout + done.stderr)[-600:])
    units, *rows = csv.DictReader(lines[first:])
    kept = [name for name in units if name and KEPT.match(name)]
    for row in rows:
        found = {f"{name} {units[name]}".strip(): row[name] for name in kept if row[name]}
        tell(part="ncu", kernel=row["Kernel Name"], grid=row["Grid Size"], **found)


def part_launches(rows_list: list[int]) -> None:
    """Six launches between the marks that a profiler heeds: three kernels of two groups."""
    rows, some = rows_list[0], [*map(Group, GROUPS)]
    runs = [group.timed(rows)[k] for group in some[::2] for k in ("shrink", "expand", "fused")]
    for run in runs:
        run(0)
    if not CPU:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for run in runs:
        run(SETS - 1)
    if not CPU:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


PARTS = {"kernels": part_kernels, "ncu": part_ncu, "launches": part_launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, default="kernels")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        PARTS[options.part](options.rows)


if __name__ == "__main__":
    main()
