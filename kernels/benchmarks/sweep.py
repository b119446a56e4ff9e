"""Compile the decode kernels on all cores, or find the settings that suit a GPU.

    python kernels/benchmarks/sweep.py [compile | tune] [--seconds 40]

`compile` fills Triton's cache with all that is tried, without a GPU. `tune` times each kernel with
all settings over the layers of a Llama-3-8B block, refuses those that are wrong, and writes the
fastest to configs/<device>.json, which all that is run afterwards takes. One JSON line a result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import deltamix_kernels
import torch
from cases import last_lines, tell
from compile_only import launches
from decode_gpu import CPU, DTYPE, GROUPS, LOOPS, SETS, TOLERANCE, Group
from deltamix_kernels import INTERPRETED, DecodePlan
from deltamix_kernels.config import config, read
from factors import random_packed
from timing import DEVICE, time_graph

CONFIGS = Path(deltamix_kernels.__file__).parent / "configs"
META = torch.device("meta")
ROWS = {"8": 1, "16": 16}  # by settings: the rows that they are chosen by
# What is tried in place of settings in configs/, by their names there.
SHRINK = [{"UNROLL": 2}, {"UNROLL": 4}, {"UNROLL": 4, "maxnreg": 80}]
TRIED: dict[str, Any] = {
    "dequantize": [{"R": 4, "C": 128}, {"R": 16, "C": 16}, {"R": 8, "C": 64}],
    "8": {
        "fused": [
            {"UNROLL": 4},
            {"UNROLL": 4, "COLUMNS": 2},
            {"COLUMNS": 2},
            {"WARPS": 8, "UNROLL": 4, "COLUMNS": 2},
        ],
        "shrink": SHRINK,
        "expand": [{"UNROLL": 4}],
    },
    "16": {
        "fused": [
            {"UNROLL": 2},
            {"COLUMNS": 1},
            {"WARPS": 8},
            {"WARPS": 8, "UNROLL": 2},
            {"WARPS": 8, "COLUMNS": 4, "UNROLL": 2},
        ],
        "shrink": SHRINK,
        "expand": [{"UNROLL": 4}],
    },
}
if INTERPRETED:
    TRIED = {"dequantize": [{"C": 32}], "8": {"shrink": [{"UNROLL": 2}]}, "16": {}}


def candidates(now: dict[str, int], tried: list[dict[str, int]]) -> list[dict[str, int]]:
    """The settings `now`, then all that are tried."""
    changed = [{**now, **change} for change in tried]
    return [now, *(some for some in changed if some != now)]


def jobs() -> Iterator[tuple[str, str, dict[str, int]]]:
    """(kernel, settings' name, settings) of all that is compiled, what is surely needed first."""
    found = {
        (kernel, tokens): candidates(read("default")[tokens][kernel], TRIED[tokens].get(kernel, []))
        for tokens in ROWS
        for kernel in ("fused", "shrink", "expand")
    }
    for i in range(max(map(len, found.values()))):
        for (kernel, tokens), some in found.items():
            yield from [(kernel, tokens, some[i])] if i < len(some) else []


def compile_one(job: tuple[str, str, dict[str, int]]) -> str:
    """Compile for an H100 by the host code that launches, on tensors without memory."""
    kernel, tokens, chosen = job
    # integers are not specialised on: all groups launch what the smallest one does
    linears, rows, settings = GROUPS[1], ROWS[tokens], read("default")
    tiles = {**settings, tokens: {**settings[tokens], kernel: chosen}}
    plan = DecodePlan([random_packed(one, META) for one in linears], DTYPE, tiles)
    x = torch.empty(rows, plan.n, dtype=DTYPE, device=META)
    h = torch.empty(rows, plan.codes.total, dtype=DTYPE, device=META)
    ys = [torch.empty(rows, one.m, dtype=DTYPE, device=META) for one in linears]
    weights = [torch.empty(one.m, one.n, dtype=DTYPE, device=META) for one in linears]
    with launches():
        if kernel == "shrink":
            plan.shrink(x)
            plan.shrink(x, True)
        elif kernel == "expand":
            for add, dependent in ((True, False), (False, False), (True, True)):
                plan.expand(h, ys, add, dependent)
        else:
            for delta, dependent in ((True, True), (True, False), (False, False)):
                plan.fused(h, x, weights, ys, None, dependent, delta)
    return f"{kernel} {tokens} {chosen}"


def part_compile(options: argparse.Namespace) -> None:
    start, found = time.perf_counter(), [*jobs()][: options.most]
    with ProcessPoolExecutor(options.processes) as pool:
        for done in as_completed([pool.submit(compile_one, job) for job in found]):
            try:
                print(f"{done.result()} at {time.perf_counter() - start:.1f} s", flush=True)
            except Exception as error:
                tell(part="compile", ok=False, error=last_lines(error))
    tell(part="compile", variants=len(found), seconds=round(time.perf_counter() - start, 1))


def part_tune(options: argparse.Namespace) -> None:
    """Keep the fastest settings of each kernel over a layer: launches read the device's own."""
    end, folder = time.perf_counter() + options.seconds, Path(options.configs)
    made, settings = [*map(Group, GROUPS)], config(DEVICE)
    checks, runs = [group.worst_dequantized for group in made], [g.dequantized for g in made]
    tried = candidates(settings["dequantize"], TRIED["dequantize"])
    choose(settings, "dequantize", None, tried, checks, runs, end)
    for kernel in ("fused", "shrink", "expand"):
        for tokens, rows in ROWS.items():
            checks = [partial(group.worst, rows, kernel) for group in made]
            # shrink and the fused launch overlap
            what = "expand" if kernel == "expand" else "linear"
            runs = [group.timed(rows)[what] for group in made]
            tried = candidates(settings[tokens][kernel], TRIED[tokens].get(kernel, []))
            choose(settings[tokens], kernel, rows, tried, checks, runs, end)
            save(settings, folder)
    runs = [group.timed(16)["linear"] for group in made]
    choose(settings, "fused_rows", 16, [settings["fused_rows"], 8], [], runs, end)
    save(settings, folder)
    tell(part="tune", settings=settings)


def save(settings: dict[str, Any], folder: Path) -> None:
    if not CPU:
        name = torch.cuda.get_device_name().replace(" ", "_")
        text = json.dumps(settings, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def choose(
    settings: dict[str, Any],
    name: str,
    rows: int | None,
    tried: list[Any],
    checks: list[Callable[[], float]],
    runs: list[Callable[[int], object]],
    end: float,
) -> None:
    """Try values of one of the `settings` until `end`; leave the fastest there."""
    now, found = settings[name], []
    for value in tried:
        if time.perf_counter() > end:
            break
        what = {"part": "tune", "of": name, "rows": rows, "tried": value}
        settings[name] = value
        try:
            if not (error := max((check() for check in checks), default=0.0)) <= TOLERANCE:
                tell(**what, ok=False, error=error)
                continue
            groups_us = [1e6 * statistics.median(time_graph(run, SETS, LOOPS)) for run in runs]
        except Exception as fault:
            tell(**what, ok=False, error=last_lines(fault))
            continue
        layer_us = sum(groups_us)
        tell(**what, layer_us=round(layer_us, 2), groups_us=[round(us, 2) for us in groups_us])
        found.append((layer_us, value))
    settings[name] = min(found, key=lambda one: one[0])[1] if found else now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"compile": part_compile, "tune": part_tune}
    parser.add_argument("part", nargs="?", choices=parts, default="tune")
    parser.add_argument("--seconds", type=float, default=40, help="of tuning")
    parser.add_argument("--configs", default=CONFIGS, help="folder for the best settings")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--most", type=int, help="compile only so many variants")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        parts[options.part](options)


if __name__ == "__main__":
    main()
