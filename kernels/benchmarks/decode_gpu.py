"""Check, then time, the decode kernels on a Llama-3-8B layer, part by part.

    python kernels/benchmarks/decode_gpu.py PART ... [--rows 1 4 16] [--seconds 30]

PARTs: compile (fill Triton's cache, no GPU needed), check, base, sweep (each kernel alone with all
tiles; layer and kernels then take
the best), layer, kernels, old. A fault of the GPU
ends a process: give each what should survive the others. A line that starts with "{" is a result,
printed as soon as it is there. Nothing is timed whose result is wrong. TRITON_INTERPRET=1 runs all
parts on a CPU with a small model; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import deltamix_kernels
import torch
import torch.nn.functional as F
import triton
from compile_only import launches
from deltamix_kernels import INTERPRETED, Packed, delta_linear, finish_linear, shrink
from deltamix_kernels.decode_plan import DecodePlan, ExpandTiles, FusedTiles, ShrinkTiles
from deltamix_kernels.layout import rank_count
from deltamix_kernels.prepack import unpack_codes
from shapes import Linear, block, runs
from torch import Tensor

from deltamix_hf.quantization.gaussian import CUBIC

CONFIGS = Path(deltamix_kernels.__file__).parent / "configs"
CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if CPU else "cuda")
LINEARS = block(32, 16, 32) if INTERPRETED else block(4096, 1024, 14336)
SETS = 1 if CPU else 8  # of codes: 27 MB each against an L2 cache of 50 MB
BASE_SETS = 1 if CPU else 2  # of base weights: 436 MB each
# Of the norm. A GPU rounds to bfloat16, the interpreter truncates.
TOLERANCE = {torch.bfloat16: 2e-2 if CPU else 1e-2, torch.float16: 2e-3}
SHRINK = [  # best known first
    ShrinkTiles(share=1, unroll=4),
    ShrinkTiles(share=2, unroll=4),
    ShrinkTiles(share=1, unroll=2),
    ShrinkTiles(share=2, unroll=2),
]
EXPAND = [
    ExpandTiles(share=1, unroll=2),
    ExpandTiles(share=1, unroll=4),
    ExpandTiles(share=2, unroll=2),
    ExpandTiles(share=4, unroll=1),
]
FUSED = [
    FusedTiles(warps=4, unroll=4),
    FusedTiles(warps=4, unroll=8),
    FusedTiles(warps=8, unroll=4),
    FusedTiles(warps=4, unroll=4, columns=2),
]


if INTERPRETED:
    SHRINK, EXPAND, FUSED = [ShrinkTiles(1, 1)], [ExpandTiles(1, 1)], [FusedTiles(1, 1)]


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def groups() -> list[list[Linear]]:
    """Layers that read the same input, in order."""
    return [list(some) for _, some in groupby(LINEARS, key=lambda linear: linear.reads)]


def random_packed(linear: Linear, device: torch.device) -> Packed:
    """Random codes (any byte is one) and scales that make the delta about a tenth of the base."""
    layout = tuple(runs(linear))
    k, made = rank_count(layout), []
    for side, length in ((1, linear.n), (2, linear.m)):
        shape = (sum(run[0] * run[side] for run in layout), -(-length // 8))
        made.append(torch.randint(256, shape, device=device, dtype=torch.uint8))
    scale = 0.3 / (linear.n * k) ** 0.25 * (0.5 + torch.rand(k, 3, device=device))
    ranks = scale.bfloat16().view(torch.int16)
    return Packed(made[0], made[1], ranks, None, layout, linear.m, linear.n, (0, 0))


def values(packed: Packed, side: int) -> Tensor:
    """The factor of one side in float64, [k, length]."""
    found, first = [], 0
    for count, *bits in packed.runs:
        b = bits[side]
        rows = packed.codes(side)[first : first + count * b].view(count, b, -1)
        c = unpack_codes(rows, b).flatten(1).double() - (2**b - 1) / 2
        found.append(CUBIC[b - 1][0] * c + CUBIC[b - 1][1] * c**3)
        first += count * b
    scale = packed.ranks[:, 1 + side].view(torch.bfloat16).double()
    return torch.cat(found) * scale[:, None]


def plans(dtype: torch.dtype = torch.bfloat16, device: torch.device = DEVICE) -> list[DecodePlan]:
    """One plan a group of the layer."""
    return [
        DecodePlan([random_packed(linear, device) for linear in some], dtype, **_defaults())
        for some in groups()
    ]


def _defaults() -> Tiles:
    return {f"{kernel}_tiles": table[0] for kernel, table in TABLES.items()}


def outputs(plan: DecodePlan, rows: int) -> list[Tensor]:
    return [torch.empty(rows, p.m, dtype=plan.dtype, device=DEVICE) for p in plan.matrices]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


_REFERENCES: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}


def reference(plan: DecodePlan, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Inputs, and the deltas' outputs of them in float64."""
    key = (id(plan.v), rows)
    if key not in _REFERENCES:
        x = torch.randn(rows, plan.n, device=DEVICE, dtype=plan.dtype)
        wanted = [x.double() @ values(p, 0).T @ values(p, 1) for p in plan.matrices]
        _REFERENCES[key] = x, wanted
    return _REFERENCES[key]


def wrong(
    plan: DecodePlan, rows: int, pdl: bool = False, weights: list[Tensor] | None = None
) -> float:
    """Largest relative error of a plan's outputs; infinite if two runs differ.

    Of shrink and expand, or with base weights of shrink and the fused kernel.
    """
    x, wanted = reference(plan, rows)
    worst, runs = 0.0, []
    for add in (False, True, True):
        ys = [torch.full_like(y, float("nan")) for y in outputs(plan, rows)]
        bases = [torch.zeros_like(w) for w in wanted]
        if add and not weights:
            torch.manual_seed(1)
            bases = [
                torch.randn_like(y) * w.std().to(y.dtype) for y, w in zip(ys, wanted, strict=True)
            ]
            ys = [base.clone() for base in bases]
        plan.h[:, plan.slots.long()] = float("nan")
        plan.shrink(x, True)
        if weights:
            bases = [F.linear(x.double(), w.double()) for w in weights]
            plan.fused(x, weights, ys, pdl=pdl)
        else:
            plan.expand(ys, add, pdl)
        for y, base, w in zip(ys, bases, wanted, strict=True):
            off = float((y.double() - base.double() - w).norm() / (base.double() + w).norm())
            worst = max(worst, off if bool(torch.isfinite(y).all()) else float("inf"))
        runs.append(ys)
    if not all(map(torch.equal, runs[1], runs[2])):
        return float("inf")
    return worst


def time_graph(run: Callable[[int], object], count: int, loops: int = 4) -> tuple[float, float]:
    """Median and least seconds of a call, in one CUDA graph of run(0..count-1), `loops` times."""
    for i in range(count):
        run(i)
    if CPU:
        start = time.perf_counter()
        run(0)
        return (time.perf_counter() - start,) * 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for _ in range(loops) for i in range(count)]
    found = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / count / loops)
    del kept
    return statistics.median(found[3:]), min(found[3:])


TABLES = {"shrink": SHRINK, "expand": EXPAND, "fused": FUSED}
Tiles = dict[str, Any]  # of "shrink", "expand" and "fused"
FIRST: Tiles = {kernel: table[0] for kernel, table in TABLES.items()}


def classes(rows: list[int]) -> list[int]:
    """A row count for each of what the kernels are compiled for: up to 8 rows and more."""
    return sorted({1 if r <= 8 else 16 for r in rows})


def variants(rows: list[int]) -> Iterator[tuple[str, int, int, dict[str, bool]]]:
    """(kernel, number of its tiles, rows, options) of all that the parts launch."""
    for i in range(max(map(len, TABLES.values()))):
        for m in classes(rows):
            yield "shrink", i, m, {"pdl": True}
            for add in (False, True):
                yield "expand", i, m, {"add": add, "pdl": False}
            for pdl in (False, True):
                yield "fused", i, m, {"pdl": pdl}
    for m in classes(rows):
        yield "expand", 0, m, {"add": True, "pdl": True}
        yield "fused", 0, m, {"pdl": False, "delta": False}
    yield from (("old", g, 1, {}) for g in range(4))


def compile_old(group: int) -> None:
    """The kernels before these, at one row."""
    ps = [random_packed(linear, DEVICE) for linear in groups()[group]]
    x = torch.empty(1, ps[0].n, dtype=torch.bfloat16, device=DEVICE)
    for p in ps if len(ps) == 1 else []:
        delta_linear(x, torch.empty(p.m, p.n, dtype=x.dtype, device=DEVICE), None, p)
    h, first = shrink(x, ps), 0
    for p in ps:
        weight = torch.empty(p.m, p.n, dtype=x.dtype, device=DEVICE)
        finish_linear(x, weight, None, h, p, first)
        first += p.rank


def compile_one(job: tuple[str, int, int, dict[str, bool]]) -> tuple[str, float]:
    """Compile for an H100 by the host code that launches, on tensors without memory."""
    global DEVICE
    DEVICE = torch.device("meta")
    start = time.perf_counter()
    kernel, i, rows, options = job
    with launches():
        if kernel == "old":
            compile_old(i)
        else:
            # integers are not specialised on: all groups launch what the smallest one does
            matrices = [random_packed(linear, DEVICE) for linear in groups()[1]]
            plan = DecodePlan(matrices, torch.bfloat16).retiled(**{kernel: TABLES[kernel][i]})
            x = torch.empty(rows, plan.n, dtype=plan.dtype, device=DEVICE)
            if kernel == "shrink":
                plan.shrink(x, **options)
            elif kernel == "expand":
                plan.expand(outputs(plan, rows), **options)
            else:
                weights = [torch.empty(p.m, p.n, dtype=x.dtype, device=DEVICE) for p in matrices]
                plan.fused(x, weights, outputs(plan, rows), **options)
    return f"{kernel} {i} rows {rows} {options}", time.perf_counter() - start


def part_compile(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    jobs = list(variants(options.rows))[: options.most]
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = [pool.submit(compile_one, job) for job in jobs]
        for done in as_completed(waiting):
            try:
                name, seconds = done.result()
                say(part="compile", variant=name, s=round(seconds, 1))
            except Exception as fault:
                say(part="compile", fault=repr(fault)[:300])
    say(part="compile", variants=len(jobs), s=round(time.perf_counter() - start, 1))


def part_check(options: argparse.Namespace) -> None:
    """Errors of every group and row count, both dtypes, both launches."""
    for dtype in (torch.bfloat16, torch.float16) if CPU else (torch.bfloat16,):
        for name, plan in zip(("qkv", "o", "gate-up", "down"), plans(dtype), strict=True):
            for rows in options.rows:
                for pdl in (False,) if CPU else (False, True):
                    start = time.perf_counter()
                    try:
                        off = wrong(plan, rows, pdl)
                    except Exception as fault:
                        say(part="check", group=name, rows=rows, pdl=pdl, fault=repr(fault)[:300])
                        continue
                    right = off <= TOLERANCE[dtype]
                    say(
                        part="check", group=name, dtype=str(dtype), rows=rows, pdl=pdl, error=off,
                        right=right, s=round(time.perf_counter() - start, 2),
                    )  # fmt: skip


def base_weights() -> list[list[Tensor]]:
    """One [m, n] a linear, per set."""
    return [
        [
            torch.randn(linear.m, linear.n, device=DEVICE, dtype=torch.bfloat16) / linear.n**0.5
            for linear in LINEARS
        ]
        for _ in range(BASE_SETS)
    ]


def layer_inputs(rows: int) -> list[Tensor]:
    return [torch.randn(rows, some[0].n, device=DEVICE, dtype=torch.bfloat16) for some in groups()]


def split_up(weights: list[Tensor]) -> list[list[Tensor]]:
    """The weights of a set by group."""
    left = iter(weights)
    return [[next(left) for _ in some] for some in groups()]


def part_base(options: argparse.Namespace) -> None:
    """A copy, an empty graph node, and the base products by shape and all together."""
    if not CPU:
        source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        seconds, _ = time_graph(lambda _: target.copy_(source), 1)
        say(part="base", what="copy", TBps=2 * source.numel() / seconds / 1e12)
        del source, target
    small = torch.zeros(1, device=DEVICE)
    seconds, _ = time_graph(lambda _: small.add_(1), 32)
    say(part="base", what="smallest kernel", us=seconds * 1e6)
    sets = base_weights()
    for rows in options.rows:
        xs = {x.shape[1]: x for x in layer_inputs(rows)}
        for j, linear in enumerate(LINEARS):
            if linear.name in ("v_proj", "up_proj"):
                continue
            seconds, least = time_graph(
                lambda i, x=xs[linear.n], j=j: F.linear(x, sets[i][j]), BASE_SETS
            )
            say(
                part="base", what=linear.name, rows=rows, us=seconds * 1e6, least=least * 1e6,
                TBps=linear.base_bytes / seconds / 1e12,
            )  # fmt: skip
        seconds, least = time_graph(
            lambda i, xs=xs: [F.linear(xs[w.shape[1]], w) for w in sets[i]], BASE_SETS
        )
        say(part="base", what="layer", rows=rows, us=seconds * 1e6, least=least * 1e6)


def time_kernels(
    sets: list[list[DecodePlan]], weights: list[Any], rows: int, kernel: str, **extra: Any
) -> float:
    """Time a kernel on each group, with the GB/s of what it reads; the microseconds of a layer."""
    total = 0.0
    for g, name in enumerate(("qkv", "o", "gate-up", "down")):
        some = [plans[g] for plans in sets]
        x = torch.randn(rows, some[0].n, device=DEVICE, dtype=some[0].dtype)
        ys = outputs(some[0], rows)
        size = (some[0].v if kernel == "shrink" else some[0].u).numel()
        if kernel == "fused":
            size += sum(2 * w.numel() for w in weights[0][g])

        def run(i: int, some: Any = some, x: Tensor = x, ys: Any = ys, g: int = g) -> None:
            if kernel == "shrink":
                some[i].shrink(x, True)
            elif kernel == "expand":
                some[i].expand(ys)
            else:
                some[i].fused(x, weights[i % BASE_SETS][g], ys)

        seconds, least = time_graph(run, len(some))
        total += seconds * 1e6
        say(
            **extra, kernel=kernel, group=name, rows=rows, us=round(seconds * 1e6, 3),
            least=round(least * 1e6, 3), KB=size >> 10, GBps=round(size / seconds / 1e9),
        )  # fmt: skip
    return total


def sound(some: list[DecodePlan], rows: list[int], weights: Any = None) -> bool:
    """Whether the plans are right at these rows; says so if not."""
    for r in rows:
        for pdl in (True,) if weights and not CPU else (False,):
            off = [wrong(p, r, pdl, weights and weights[g]) for g, p in enumerate(some)]
            if not max(off) <= TOLERANCE[some[0].dtype]:
                say(part="refused", rows=r, pdl=pdl, error=max(off), fused=bool(weights))
                return False
    return True


def retiled(sets: list[list[DecodePlan]], tiles: Tiles) -> list[list[DecodePlan]]:
    return [[plan.retiled(**tiles) for plan in some] for some in sets]


BEST: dict[int, Tiles] = {}  # by rows, what the sweep found


def part_kernels(options: argparse.Namespace) -> None:
    """Each kernel alone with the best tiles known."""
    sets = [plans() for _ in range(SETS)]
    weights = [split_up(some) for some in base_weights()]
    for rows in options.rows:
        now = retiled(sets, BEST.get(rows, FIRST))
        if sound(now[0], [rows]) and sound(now[0], [rows], weights[0]):
            for kernel in TABLES:
                time_kernels(now, weights, rows, kernel, part="kernels")


def part_sweep(options: argparse.Namespace) -> None:
    """Each kernel alone with all its tiles; keep the fastest over a layer."""
    end = time.perf_counter() + options.seconds
    sets = [plans() for _ in range(SETS)]
    weights = [split_up(some) for some in base_weights()]
    for rows in options.rows:
        BEST[rows] = dict(FIRST)
        for kernel, table in TABLES.items():
            found: dict[int, float] = {}
            for i, tiles in enumerate(table):
                if time.perf_counter() > end:
                    continue
                what = {"part": "sweep", "number": i, "tiles": dataclasses.asdict(tiles)}
                try:
                    now = retiled(sets, {kernel: tiles})
                    if sound(now[0], [rows], weights[0] if kernel == "fused" else None):
                        found[i] = time_kernels(now, weights, rows, kernel, **what)
                except Exception as fault:
                    say(**what, kernel=kernel, rows=rows, fault=repr(fault)[:300])
            if found:
                best = min(found, key=found.__getitem__)
                BEST[rows][kernel] = table[best]
                every = {i: round(us, 2) for i, us in found.items()}
                say(part="sweep", kernel=kernel, rows=rows, best=best, layer_us=every)
    if not CPU:
        write_tiles(Path(options.configs))


def write_tiles(folder: Path) -> None:
    """Put the best tiles into configs/<device>.json."""
    name = torch.cuda.get_device_name().replace(" ", "_")
    config = json.loads((CONFIGS / "default.json").read_text(encoding="utf-8"))
    config["decode_plan"] = {
        str(rows): {kernel: dataclasses.asdict(tiles) for kernel, tiles in some.items()}
        for rows, some in BEST.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    say(part="sweep", device=name, decode_plan=config["decode_plan"])


def beside(stream: Any, work: Callable[[], object], ys: Callable[[], Any]) -> Any:
    """work() on the side stream beside ys()."""
    if CPU:
        work()
        return ys()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    found = ys()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def schedules() -> dict[str, Callable[..., list[Tensor]]]:
    """Name -> function of one group's plan, x, weights, and spare outputs: the group's outputs."""
    first = None if CPU else torch.cuda.Stream(priority=-1)

    def base(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
        return [F.linear(x, w) for w in weights]

    def serial(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
        plan.shrink(x, True)
        ys = base(plan, x, weights, spare)
        plan.expand(ys)
        return ys

    def fused(pdl: bool, delta: bool = True) -> Callable[..., list[Tensor]]:
        def run(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
            if delta:
                plan.shrink(x, True)
            plan.fused(x, weights, spare, delta, pdl)
            return spare

        return run

    def side(pdl: bool) -> Callable[..., list[Tensor]]:
        def run(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
            ys = beside(first, lambda: plan.shrink(x, True), lambda: base(plan, x, weights, spare))
            plan.expand(ys, pdl=pdl)
            return ys

        return run

    def both(pdl: bool, add: bool) -> Callable[..., list[Tensor]]:
        def run(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
            def delta() -> None:
                plan.shrink(x, True)
                plan.expand(spare, add=False, pdl=pdl)

            ys = beside(first, delta, lambda: base(plan, x, weights, spare))
            if add:
                torch._foreach_add_(ys, spare)
            return ys

        return run

    return {
        "base": base,
        "serial": serial,
        "shrink beside base": side(False),
        "shrink beside base, expand by pdl": side(True),
        "both beside base, then add": both(False, True),
        "fused base alone": fused(False, False),
        "shrink, then fused": fused(False),
        "shrink, then fused by pdl": fused(True),
    }


def part_layer(options: argparse.Namespace) -> None:
    """The whole layer by every schedule, with the best tiles known."""
    first = [plans() for _ in range(SETS)]
    weights = [split_up(some) for some in base_weights()]
    for rows in options.rows:
        sets = retiled(first, BEST.get(rows, FIRST))
        if not sound(sets[0], [rows]) or not sound(sets[0], [rows], weights[0]):
            continue
        xs = layer_inputs(rows)
        spare = [[outputs(plan, rows) for plan in some] for some in sets]

        def layer(
            run: Callable[..., list[Tensor]],
            i: int,
            sets: Any = sets,
            xs: Any = xs,
            ys: Any = spare,
        ) -> list[Tensor]:
            found: list[Tensor] = []
            for g, x in enumerate(xs):
                found += run(sets[i][g], x, weights[i % BASE_SETS][g], ys[i][g])
            return found

        ways = schedules()
        wanted = {
            "fused base alone": [y.double() for y in layer(ways["base"], 0)],
            "": [y.double() for y in layer(ways["serial"], 0)],
        }
        base_us, times = None, {}
        for name, run in ways.items():
            try:
                if name != "base":
                    off = max(map(error, layer(run, 0), wanted.get(name, wanted[""])))
                    if not off <= 1e-2:
                        say(part="layer", way=name, rows=rows, refused=off)
                        continue
                seconds, least = time_graph(lambda i, run=run: layer(run, i), SETS, 1)
            except Exception as fault:
                say(part="layer", way=name, rows=rows, fault=repr(fault)[:300])
                continue
            base_us = base_us or seconds * 1e6
            if "base" != name != "fused base alone":
                times[name] = seconds * 1e6
            say(
                part="layer", way=name, rows=rows, us=round(seconds * 1e6, 2),
                least=round(least * 1e6, 2), ratio=round(seconds * 1e6 / base_us, 4),
            )  # fmt: skip
        if times and base_us:
            best = min(times, key=times.__getitem__)
            ratio = round(times[best] / base_us, 4)
            say(part="layer", winner=best, rows=rows, us=round(times[best], 2), ratio=ratio)


def part_old(options: argparse.Namespace) -> None:
    """The layer by the kernels before these."""
    weights = [split_up(some) for some in base_weights()]
    packed = [[random_packed(linear, DEVICE) for linear in LINEARS] for _ in range(BASE_SETS)]
    for rows in options.rows:
        xs = layer_inputs(rows)

        def layer(i: int, xs: list[Tensor] = xs) -> list[Tensor]:
            found: list[Tensor] = []
            for x, ws, ps in zip(xs, weights[i], split_up(packed[i]), strict=True):
                if len(ws) == 1:
                    found.append(delta_linear(x, ws[0], None, ps[0]))
                    continue
                h, first = shrink(x, ps), 0
                for w, p in zip(ws, ps, strict=True):
                    found.append(finish_linear(x, w, None, h, p, first))
                    first += p.rank
            return found

        start = time.perf_counter()
        layer(0)
        warm = time.perf_counter() - start
        seconds, least = time_graph(layer, BASE_SETS)
        say(part="old", rows=rows, us=seconds * 1e6, least=least * 1e6, first_call_s=warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {n[5:]: f for n, f in globals().items() if n.startswith("part_")}
    parser.add_argument("part", nargs="+", choices=[*parts, "all"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=60, help="of the sweep")
    parser.add_argument("--configs", default=CONFIGS, help="folder for the best tiles")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--most", type=int, help="compile only so many variants")
    options = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    everything = [n for n in parts if n != "compile"]
    for name in everything if "all" in options.part else options.part:
        try:
            with nullcontext() if name == "compile" else torch.inference_mode():
                parts[name](options)
        except Exception as fault:
            say(part=name, fault=repr(fault)[:500])
        say(part=name, total_s=round(time.perf_counter() - start, 1))
    say(versions=[
        torch.__version__, triton.__version__, sys.version.split()[0],
        "cpu" if CPU else torch.cuda.get_device_name(),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
