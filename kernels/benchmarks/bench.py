"""Check, then time, a decoder block's linear layers with their deltas, on a GPU.

    python kernels/benchmarks/bench.py [--model Llama-3-8B] [--rows 1 4 16] [--ways base ours]

Every way but the reference is timed over the whole block in one CUDA graph, in which the weights of
several blocks take turns, so that none is left in the cache. Ways are: the base's products alone;
ours as the library launches them, and one launch after the other; the torch reference; and the
rivals of rivals.py, LoRA once with our ranks and once with our bytes. A way's result is compared
with float64 first; a wrong one is never timed. Prints one JSON line for each way and number of
rows; a way that fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import rivals
import torch
from cases import last_lines, tell
from deltamix_kernels import DECODE_ROWS, INTERPRETED, DecodePlan, delta_linear
from factors import TINY, groups, kernel_form, layer_factors
from shapes import MODELS, Linear, bytes_of, delta_bytes
from timing import DEVICE, copy_rate, spread, time_eager, time_graph
from torch import Tensor

from deltamix_hf.ops import low_rank

ROWS = (1, 4, 16, 64, 2048)
BLOCKS = 4  # whose weights take turns: a block of 7B, 400 MB, is 8 times the cache of an H100
LOOPS = 4  # of a graph over all blocks
TOLERANCE = 2e-2  # of the largest output, bfloat16
DTYPE = torch.bfloat16


class Group:
    """Layers of one input with random base weights, and deltas whose outputs are a tenth as large.

    Attributes:
        factors, packed: the deltas, for float64 and for the kernels.
    """

    def __init__(self, linears: list[Linear], seed: int):
        torch.manual_seed(seed)
        self.linears, self.reads, self.n = linears, linears[0].reads, linears[0].n
        self.factors = [layer_factors(one, DEVICE, 10 * seed + i) for i, one in enumerate(linears)]
        self.packed = [kernel_form(factors) for factors in self.factors]
        like = {"device": DEVICE, "dtype": DTYPE}
        self.weights = [torch.randn(one.m, one.n, **like) / one.n**0.5 for one in linears]
        self.biases = [torch.randn(one.m, **like) if one.bias else None for one in linears]
        self.base = rivals.base(self.weights, self.biases)

    def deltas(self) -> list[Tensor]:
        return [factors.dense() for factors in self.factors]

    def low_rank(self, of_bytes: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The factors in bf16; `of_bytes`: only as many ranks as take the packed delta's bytes."""
        rights, lefts = [], []
        for one, factors in zip(self.linears, self.factors, strict=True):
            fits = delta_bytes(one, factors.runs) // (2 * (one.m + one.n))
            k = max(1, fits) if of_bytes else factors.rank
            rights.append(factors.right()[:k].to(DTYPE))
            lefts.append(factors.left()[:k].to(DTYPE))
        return rights, lefts


class Way(NamedTuple):
    """What makes a group's outputs, and the deltas they must have: None for the base alone."""

    run: rivals.Run
    deltas: Callable[[], list[Tensor]] | None


def base(group: Group, rows: int) -> Way:
    return Way(group.base, None)


def ours(group: Group, rows: int) -> Way:
    """As the library runs them."""
    if rows <= DECODE_ROWS:
        plan = DecodePlan(group.packed, DTYPE)
        return Way(lambda x: plan.linear(x, group.weights, group.biases), group.deltas)
    layers = [*zip(group.weights, group.biases, group.packed, strict=True)]
    return Way(lambda x: [delta_linear(x, *layer) for layer in layers], group.deltas)


def one_by_one(group: Group, rows: int) -> Way | None:
    if rows > DECODE_ROWS:
        return None
    plan = DecodePlan(group.packed, DTYPE)

    def run(x: Tensor) -> list[Tensor]:
        outputs = group.base(x)
        plan.expand(plan.shrink(x), outputs)
        return outputs

    return Way(run, group.deltas)


def our_base(group: Group, rows: int) -> Way | None:
    """The base's part of the fused kernel."""
    if rows > 16:
        return None
    plan = DecodePlan(group.packed, DTYPE)

    def run(x: Tensor) -> list[Tensor]:
        outputs = [x.new_empty(len(x), m) for m in plan.lengths]
        h = x.new_empty(len(x), plan.codes.total)
        plan.fused(h, x, group.weights, outputs, group.biases, delta=False)
        return outputs

    return Way(run, None)


def reference(group: Group, rows: int) -> Way:
    os.environ["DELTAMIX_KERNEL"] = "reference"  # of the library's ops, which no other way calls

    def one(x: Tensor, i: int) -> Tensor:
        own = group.weights[i], group.biases[i]
        return low_rank.delta_linear(x, *own, *group.factors[i].op_arguments)

    return Way(lambda x: [one(x, i) for i in range(len(group.linears))], group.deltas)


def lora(group: Group, rows: int) -> Way:
    return Way(rivals.lora(group.weights, group.biases, *group.low_rank()), group.deltas)


def small_lora(group: Group, rows: int) -> Way:
    rights, lefts = group.low_rank(of_bytes=True)
    return Way(
        rivals.lora(group.weights, group.biases, rights, lefts),
        lambda: [left.T @ right for right, left in zip(rights, lefts, strict=True)],
    )


def vllm_lora(group: Group, rows: int) -> Way:
    run = rivals.vllm_lora(group.weights, group.biases, *group.low_rank(), rows)
    return Way(run, group.deltas)


def merged(group: Group, rows: int) -> Way:
    return Way(rivals.merged(group.weights, group.biases, group.deltas()), group.deltas)


def one_bit(group: Group, rows: int) -> Way | None:
    if INTERPRETED:  # its tl.dot takes the bits of bfloat16 for integers
        return None
    signs = [rivals.OneBit(delta) for delta in group.deltas()]
    run = rivals.one_bit(group.weights, group.biases, signs)
    return Way(run, lambda: [sign.dense() for sign in signs])


def gemlite(group: Group, rows: int) -> Way:
    return Way(rivals.gemlite(group.weights, group.biases, group.deltas()), group.deltas)


WAYS: dict[str, Callable[[Group, int], Way | None]] = {
    "base": base,
    "ours": ours,
    "one-by-one": one_by_one,
    "our-base": our_base,
    "lora": lora,
    "lora-of-our-bytes": small_lora,
    "vllm-lora": vllm_lora,
    "merged": merged,
    "reference": reference,
    "one-bit": one_bit,
    "gemlite": gemlite,
}


def check(name: str, group: Group, way: Way, x: Tensor) -> None:
    """Raise ValueError if a way is not within TOLERANCE of float64 (gemlite rounds: of 50 %)."""
    found, again = way.run(x), way.run(x)
    deltas = way.deltas() if way.deltas else [torch.zeros(())] * len(found)
    few, most = x[:16].double(), 0.5 if name == "gemlite" else TOLERANCE
    for one, y, w, b, delta in zip(
        group.linears, found, group.weights, group.biases, deltas, strict=True
    ):
        expected = few @ (w.double() + delta.to(DEVICE).double()).T
        if b is not None:
            expected += b.double()
        off = float((y[:16].double() - expected).abs().max() / expected.abs().max())
        if not off <= most:
            raise ValueError(f"{one.name}: error {off:.3g}; nothing is timed")
    ours = name in ("ours", "one-by-one", "our-base")  # rivals may add up in any order
    if ours and not all(map(torch.equal, found, again)):
        raise ValueError("two runs differ")


def measure(name: str, blocks: list[list[Group]], inputs: dict[str, Tensor]) -> list[float] | None:
    """Seconds of a block; None if the way is not for so many rows."""
    rows = len(next(iter(inputs.values())))
    made = [[WAYS[name](group, rows) for group in block] for block in blocks]
    ways = [[way for way in some if way is not None] for some in made]
    if not ways[0]:
        return None
    for group, way in zip(blocks[0], ways[0], strict=True):
        check(name, group, way, inputs[group.reads])

    def block(i: int) -> list[list[Tensor]]:
        return [way.run(inputs[group.reads]) for group, way in zip(blocks[i], ways[i], strict=True)]

    if name == "reference":  # it copies from the host, which no graph may hold
        return time_eager(lambda: block(0))
    return time_graph(block, len(blocks), LOOPS)


def measure_all(
    linears: list[Linear], rows: int, names: list[str], blocks: list[list[Group]], rate: float
) -> None:
    """Check and time the ways at one number of rows; one JSON line each."""
    (weights, deltas), middle = bytes_of(linears), None
    moved = {"base": weights, "ours": weights + deltas}
    inputs = {g.reads: torch.randn(rows, g.n, device=DEVICE, dtype=DTYPE) for g in blocks[0]}
    for name in names:
        started, row = time.perf_counter(), {"rows": rows, "way": name}
        try:
            found = measure(name, blocks, inputs)
        except ImportError as error:
            tell(**row, skipped=str(error))
            continue
        except Exception as error:
            tell(**row, ok=False, error=last_lines(error))
            continue
        if found is None:
            continue
        median = statistics.median(found)
        middle = median if name == "base" else middle
        row |= {**spread(found), "of base": round(median / middle, 3) if middle else None}
        if name in moved and rows <= DECODE_ROWS:
            row["share of copy rate"] = round(moved[name] / median / rate, 3)
        tell(**row, seconds=round(time.perf_counter() - started, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    options = parser.parse_args()
    linears, count, size = MODELS[options.model], BLOCKS, 1 << 30
    if options.tiny:
        linears, count, size, options.rows = TINY[:4], 1, 1 << 16, options.rows[:1]
    elif DEVICE.type == "cpu":
        raise SystemExit("no GPU: kernels/benchmarks/model.py prints what to expect of one")
    tell(model=options.model, tiny=options.tiny, blocks=count)
    with torch.no_grad():
        rate = copy_rate(size)
        blocks = [
            [Group(some, 10 * seed + i) for i, some in enumerate(groups(linears))]
            for seed in range(count)
        ]
        for rows in options.rows:
            measure_all(linears, rows, options.ways, blocks, rate)


if __name__ == "__main__":
    main()
