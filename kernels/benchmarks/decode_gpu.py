"""Check, then time, the decode kernels on a Llama-3-8B layer, part by part.

    python kernels/benchmarks/decode_gpu.py PART ... [--rows 1 4 16] [--seconds 30]

PARTs: compile (fill Triton's cache, no GPU needed), check, base, kernels, layer, sweep, old. A
fault of the GPU ends a process: give each what should survive the others. A line that starts with
"{" is a result, printed as soon as it is there. Nothing is timed whose result is wrong.
TRITON_INTERPRET=1 runs all parts on a CPU with a small model; its times mean nothing.
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
from typing import Any

import torch
import torch.nn.functional as F
import triton
from compile_only import launches
from deltamix_kernels import INTERPRETED, Packed, delta_linear, finish_linear, shrink
from deltamix_kernels.decode_plan import DecodePlan, ExpandTiles, ShrinkTiles
from deltamix_kernels.layout import rank_count
from deltamix_kernels.prepack import unpack_codes
from shapes import Linear, block, runs
from torch import Tensor

CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if CPU else "cuda")
LINEARS = block(64, 16, 96) if INTERPRETED else block(4096, 1024, 14336)
SETS = 1 if CPU else 8  # of codes: 27 MB each against an L2 cache of 50 MB
BASE_SETS = 1 if CPU else 2  # of base weights: 436 MB each
# Of the norm. A GPU rounds to bfloat16, the interpreter truncates.
TOLERANCE = {torch.bfloat16: 2e-2 if CPU else 1e-2, torch.float16: 2e-3}
CUBIC = (
    (1.5957691, 0.0),
    (0.892898, 0.0506908),
    (0.471466, 0.0115843),
    (0.240515, 0.00209738),
    (0.121831, 3.36750e-4),
    (0.0617039, 5.08628e-5),
    (0.0312720, 7.40792e-6),
    (0.0158606, 1.05197e-6),
)
SHRINK = [  # best known first
    ShrinkTiles(R=32, C=32, S=4, splits=4),
    ShrinkTiles(R=32, C=32, S=4, splits=2),
    ShrinkTiles(R=32, C=32, S=4, splits=1),
    ShrinkTiles(R=16, C=32, S=4, splits=2),
    ShrinkTiles(R=16, C=32, S=4, splits=1),
    ShrinkTiles(R=16, C=32, S=8, splits=1),
    ShrinkTiles(R=32, C=32, S=1, splits=16, stages=3),
    ShrinkTiles(R=64, C=32, S=4, splits=4),
]
EXPAND = [
    ExpandTiles(R=32, C=16, S=4, programs=264),
    ExpandTiles(R=32, C=16, S=4, programs=132),
    ExpandTiles(R=32, C=16, S=4, programs=528),
    ExpandTiles(R=32, C=16, S=4, programs=1),  # never split
    ExpandTiles(R=32, C=16, S=8, programs=1),
    ExpandTiles(R=32, C=16, S=2, programs=528),
    ExpandTiles(R=64, C=16, S=1, programs=1056, stages=3),
    ExpandTiles(R=32, C=16, S=4, programs=264, stages=3),
    ExpandTiles(R=64, C=16, S=4, programs=264),
]


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


def plans(
    dtype: torch.dtype = torch.bfloat16,
    tiles: tuple[ShrinkTiles, ExpandTiles] = (SHRINK[0], EXPAND[0]),
    device: torch.device = DEVICE,
) -> list[DecodePlan]:
    """One plan a group of the layer."""
    return [
        DecodePlan([random_packed(linear, device) for linear in some], dtype, *tiles)
        for some in groups()
    ]


def outputs(plan: DecodePlan, rows: int) -> list[Tensor]:
    return [torch.empty(rows, p.m, dtype=plan.dtype, device=DEVICE) for p in plan.matrices]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def wrong(plan: DecodePlan, rows: int, pdl: bool = False) -> float:
    """Largest relative error of a plan's outputs on fresh inputs; infinite if two runs differ."""
    x = torch.randn(rows, plan.n, device=DEVICE, dtype=plan.dtype)
    wanted = [x.double() @ values(p, 0).T @ values(p, 1) for p in plan.matrices]
    worst, first = 0.0, None
    for add in (False, True, True):
        ys = [torch.full_like(y, float("nan")) for y in outputs(plan, rows)]
        bases = [torch.zeros_like(y) for y in ys]
        if add:
            torch.manual_seed(1)
            bases = [
                torch.randn_like(y) * w.std().to(y.dtype) for y, w in zip(ys, wanted, strict=True)
            ]
            ys = [base.clone() for base in bases]
        plan.h[:, plan.slots.long()] = float("nan")
        for parts in plan._parts.values():
            for part in parts:
                part.fill_(float("nan"))
        plan.shrink(x, pdl)
        plan.expand(ys, add, pdl)
        for y, base, w in zip(ys, bases, wanted, strict=True):
            worst = max(worst, error(y, w + base.double()))
            if not bool(torch.isfinite(y).all()):
                worst = float("inf")
        if add and first is not None and not all(map(torch.equal, first, ys)):
            worst = float("inf")
        first = ys if add else None
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


def variants(rows: list[int]) -> Iterator[tuple[int, int, int, str, dict[str, bool]]]:
    """(shrink tiles, expand tiles, rows, kernel, options) of all that the parts launch."""
    for m in dict.fromkeys(max(8, triton.next_power_of_2(r)) for r in rows):
        for pdl in (False, True):
            yield 0, 0, m, "shrink", {"pdl": pdl}
            for add in (True, False):
                yield 0, 0, m, "expand", {"pdl": pdl, "add": add}
    for m in dict.fromkeys(max(8, triton.next_power_of_2(r)) for r in rows):
        for i in range(1, max(len(SHRINK), len(EXPAND))):
            if i < len(SHRINK):
                yield i, 0, m, "shrink", {}
            if i < len(EXPAND):
                yield 0, i, m, "expand", {}
    yield from ((g, 0, 1, "old", {}) for g in range(4))


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


def compile_one(job: tuple[int, int, int, str, dict[str, bool]]) -> tuple[str, float]:
    """Compile for an H100 by the host code that launches, on tensors without memory."""
    global DEVICE
    DEVICE = torch.device("meta")
    start = time.perf_counter()
    s, e, rows, kernel, options = job
    with launches():
        if kernel == "old":
            compile_old(s)
        else:
            for plan in plans(tiles=(SHRINK[s], EXPAND[e]), device=DEVICE):
                if kernel == "shrink":
                    x = torch.empty(rows, plan.n, dtype=plan.dtype, device=DEVICE)
                    plan.shrink(x, **options)
                else:
                    plan.expand(outputs(plan, rows), **options)
    return (
        f"{kernel} {e if kernel == 'expand' else s} M {rows} {options}",
        time.perf_counter() - start,
    )


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
        for name, plan in zip(["qkv", "o", "gate-up", "down"], plans(dtype), strict=True):
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
            seconds, least = time_graph(lambda i: F.linear(xs[linear.n], sets[i][j]), BASE_SETS)  # noqa: B023
            say(
                part="base", what=linear.name, rows=rows, us=seconds * 1e6, least=least * 1e6,
                TBps=linear.base_bytes / seconds / 1e12,
            )  # fmt: skip
        seconds, least = time_graph(
            lambda i: [F.linear(xs[w.shape[1]], w) for w in sets[i]],  # noqa: B023
            BASE_SETS,
        )
        say(part="base", what="layer", rows=rows, us=seconds * 1e6, least=least * 1e6)


def time_kernels(
    sets: list[list[DecodePlan]], rows: int, which: tuple[str, ...], **extra: Any
) -> None:
    """Each group's shrink and expand, one after the other, with the GB/s of its codes."""
    for g, name in enumerate(["qkv", "o", "gate-up", "down"]):
        some = [plans[g] for plans in sets]
        x = torch.randn(rows, some[0].n, device=DEVICE, dtype=some[0].dtype)
        ys = outputs(some[0], rows)
        runs_of: dict[str, tuple[Callable[[int], object], int]] = {
            "shrink": (lambda i, some=some, x=x: some[i].shrink(x), some[0].v.numel()),
            "expand": (lambda i, some=some, ys=ys: some[i].expand(ys, False), some[0].u.numel()),
        }
        for kernel in which:
            run, size = runs_of[kernel]
            seconds, least = time_graph(run, len(some))
            programs = len(some[0].v_tiles if kernel == "shrink" else some[0].u_tiles)
            say(
                **extra, kernel=kernel, group=name, rows=rows, us=round(seconds * 1e6, 3),
                least=round(least * 1e6, 3), KB=size >> 10, GBps=round(size / seconds / 1e9),
                programs=programs, parts=some[0].most if kernel == "expand" else 1,
            )  # fmt: skip


def part_kernels(options: argparse.Namespace) -> None:
    sets = [plans() for _ in range(SETS)]
    if not sound(sets[0], options.rows[:1]):
        return
    for rows in options.rows:
        time_kernels(sets, rows, ("shrink", "expand"), part="kernels")


def sound(some: list[DecodePlan], rows: list[int]) -> bool:
    """Whether the plans are right at these rows; says so if not."""
    for r in rows:
        worst = max(wrong(plan, r) for plan in some)
        if not worst <= TOLERANCE[some[0].dtype]:
            say(part="refused", rows=r, error=worst)
            return False
    return True


def schedules() -> dict[str, Callable[..., list[Tensor]]]:
    """Name -> function of one group's plan, x, weights, and spare outputs: the group's outputs."""
    streams = [None, None] if CPU else [torch.cuda.Stream(priority=p) for p in (-1, 0)]

    def base(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
        return [F.linear(x, w) for w in weights]

    def serial(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
        plan.shrink(x)
        ys = base(plan, x, weights, spare)
        plan.expand(ys)
        return ys

    def chain(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
        ys = base(plan, x, weights, spare)
        plan.shrink(x, pdl=True)
        plan.expand(ys, pdl=True)
        return ys

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

    def side(stream: Any, pdl: bool) -> Callable[..., list[Tensor]]:
        def run(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
            ys = beside(stream, lambda: plan.shrink(x), lambda: base(plan, x, weights, spare))
            plan.expand(ys, pdl=pdl)
            return ys

        return run

    def both(pdl: bool, add: bool) -> Callable[..., list[Tensor]]:
        def run(plan: DecodePlan, x: Tensor, weights: list[Tensor], spare: list[Tensor]) -> Any:
            def delta() -> None:
                plan.shrink(x, pdl=pdl)
                plan.expand(spare, add=False, pdl=pdl)

            ys = beside(streams[0], delta, lambda: base(plan, x, weights, spare))
            if add:
                torch._foreach_add_(ys, spare)
            return ys

        return run

    return {
        "base": base,
        "serial": serial,
        "shrink beside base": side(streams[0], False),
        "shrink beside base, low priority": side(streams[1], False),
        "shrink beside base, expand by pdl": side(streams[0], True),
        "base, shrink, expand by pdl": chain,
        "both beside base, then add": both(False, True),
        "both beside base by pdl, then add": both(True, True),
        "both beside base, sum left out": both(False, False),
    }


def part_layer(options: argparse.Namespace) -> None:
    """The whole layer by every schedule."""
    sets = [plans() for _ in range(SETS)]
    weights = [split_up(some) for some in base_weights()]
    for rows in options.rows:
        if not sound(sets[0], [rows]):
            continue
        xs = layer_inputs(rows)
        spare = [[outputs(plan, rows) for plan in some] for some in sets]

        def layer(run: Callable[..., list[Tensor]], i: int) -> list[Tensor]:
            found: list[Tensor] = []
            for g, x in enumerate(xs):  # noqa: B023
                found += run(sets[i][g], x, weights[i % BASE_SETS][g], spare[i][g])  # noqa: B023
            return found

        wanted = [y.float() for y in layer(schedules()["serial"], 0)]
        base_us = None
        for name, run in schedules().items():
            try:
                if name != "base" and "left out" not in name:
                    off = max(map(error, layer(run, 0), [w.double() for w in wanted]))
                    if not off <= 1e-2:
                        say(part="layer", way=name, rows=rows, refused=off)
                        continue
                seconds, least = time_graph(lambda i, run=run: layer(run, i), SETS, 1)
            except Exception as fault:
                say(part="layer", way=name, rows=rows, fault=repr(fault)[:300])
                continue
            base_us = base_us or seconds * 1e6
            say(
                part="layer", way=name, rows=rows, us=round(seconds * 1e6, 2),
                least=round(least * 1e6, 2), ratio=round(seconds * 1e6 / base_us, 4),
            )  # fmt: skip


def part_sweep(options: argparse.Namespace) -> None:
    """Each kernel with other tiles, until the time is over."""
    end = time.perf_counter() + options.seconds
    first = [plans() for _ in range(SETS)]
    for rows in options.rows:
        for i in range(2 if CPU else max(len(SHRINK), len(EXPAND))):
            for kernel, table in (("expand", EXPAND), ("shrink", SHRINK)):
                if i >= len(table) or time.perf_counter() > end:
                    continue
                tiles = (SHRINK[0], EXPAND[i]) if kernel == "expand" else (SHRINK[i], EXPAND[0])
                what = {"part": "sweep", **dataclasses.asdict(table[i])}
                try:
                    sets = [[plan.retiled(*tiles) for plan in some] for some in first]
                    if sound(sets[0], [rows]):
                        time_kernels(sets, rows, (kernel,), **what)
                except Exception as fault:
                    say(**what, kernel=kernel, rows=rows, fault=repr(fault)[:300])


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
    parser.add_argument("--seconds", type=float, default=30, help="of the sweep")
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
