"""Check, then time, a decoder block's linear layers with their deltas, on a GPU.

    python kernels/benchmarks/bench.py [--model Llama-3-8B] [--rows 1 4 16] [--ways abcdef]

Every way is timed over the whole block in one CUDA graph: (a) the base products alone, (b) base +
delta by our kernels, (c) by the torch reference, (d) base + dense bf16 factors of the same ranks
(the LoRA way), (e) base + a 1-bit dense delta (BitDelta), (f) base + a 2-bit dense delta by
gemlite, if installed. Weights of several blocks take turns, so that none is left in the cache. A
way's result is compared with float64 first; a wrong one is never timed. Prints one JSON line for
each way and number of rows; a way that fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import last_lines
from deltamix_kernels import DECODE_ROWS, delta_linear, finish_linear, shrink
from factors import kernel_form, random_factors
from model import block_costs
from rivals import OneBit, gemlite_linear, lora
from shapes import MODELS, Linear, runs
from timing import DEVICE, spread, time_graph
from torch import Tensor

from deltamix_hf.ops import low_rank

ROWS = (1, 4, 16, 64, 2048)
BLOCKS = 4  # whose weights take turns: a block of 7B, 400 MB, is 8 times the cache of an H100
TOLERANCE = 2e-2  # of the largest output, bfloat16


class Layer:
    """One linear layer with random base weight and packed delta, in every form that is timed.

    The delta's outputs are about a tenth of the base's.
    """

    def __init__(self, linear: Linear, seed: int, with_base: bool = True):
        torch.manual_seed(seed)
        self.linear = linear
        m, n = linear.m, linear.n
        self.factors = random_factors(m, n, runs(linear), DEVICE, seed, size=0.1)
        self.packed = kernel_form(self.factors)
        if with_base:
            self.weight = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16) / n**0.5
            like = {"device": DEVICE, "dtype": torch.bfloat16}
            self.bias = torch.randn(m, **like) if linear.bias else None

    @property
    def arguments(self) -> tuple:
        p = self.packed
        return p.v, p.u, p.ranks, None, [number for run in p.runs for number in run], [0, 0]

    def reference(self, x: Tensor) -> Tensor:
        return low_rank.delta_linear(x, self.weight, self.bias, *self.arguments, "reference")


def ours(layers: list[Layer], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The block by our kernels: layers that read the same tensor share a shrink launch."""
    out: list[Tensor] = []
    waiting = list(layers)
    while waiting:
        group = [layer for layer in waiting if layer.linear.reads == waiting[0].linear.reads]
        waiting = waiting[len(group) :]
        x = inputs[group[0].linear.reads]
        if len(group) == 1:
            out.append(delta_linear(x, group[0].weight, group[0].bias, group[0].packed))
            continue
        h, first = shrink(x, [layer.packed for layer in group]), 0
        for layer in group:
            out.append(finish_linear(x, layer.weight, layer.bias, h, layer.packed, first))
            first += layer.packed.rank
    return out


Block = list[Layer]
Inputs = dict[str, Tensor]  # by what the layers of a block read
Way = Callable[[int], list[Tensor]]  # a block's number -> its outputs


def apart(make: Callable[[Layer], Callable[[Tensor], Tensor]]) -> Callable[..., Way]:
    """A way that knows only single layers: `make(layer)` is what maps x to y."""

    def way(blocks: list[Block], inputs: Inputs) -> Way:
        made = [[(make(layer), layer.linear.reads) for layer in block] for block in blocks]
        return lambda i: [run(inputs[reads]) for run, reads in made[i]]

    return way


def dense_factors(layer: Layer) -> Callable[[Tensor], Tensor]:
    right, left = (t.bfloat16() for t in (layer.factors.right(), layer.factors.left()))
    return lambda x: lora(x, layer.weight, layer.bias, right, left)


def one_bit(layer: Layer) -> Callable[[Tensor], Tensor]:
    sign = OneBit(layer.factors.dense())
    return lambda x: sign(x, layer.weight, layer.bias)


def two_bit(layer: Layer) -> Callable[[Tensor], Tensor]:
    product = gemlite_linear(layer.factors.dense().bfloat16())
    if product is None:
        raise ImportError("gemlite is not installed")
    return lambda x: F.linear(x, layer.weight, layer.bias) + product(x)


def merged(layer: Layer) -> Callable[[Tensor], Tensor]:
    weight = layer.weight + layer.factors.dense().bfloat16()
    return lambda x: F.linear(x, weight, layer.bias)


WAYS: dict[str, tuple[str, Callable[..., Way]]] = {
    "a": ("base", apart(lambda layer: lambda x: F.linear(x, layer.weight, layer.bias))),
    "b": ("ours", lambda blocks, inputs: lambda i: ours(blocks[i], inputs)),
    "c": ("reference", apart(lambda layer: layer.reference)),
    "d": ("lora", apart(dense_factors)),
    "e": ("one bit", apart(one_bit)),
    "f": ("gemlite", apart(two_bit)),
    "g": ("merged", apart(merged)),
}


def check(name: str, run: Way, block: Block, inputs: Inputs) -> None:
    """Raises if a way is not within TOLERANCE of float64 (gemlite rounds: within 50 %)."""
    for layer, y in zip(block, run(0), strict=True):
        x = inputs[layer.linear.reads][:16].double()
        delta = layer.factors.dense()
        if name == "base":
            delta = torch.zeros_like(delta)
        elif name == "one bit":
            delta = OneBit(delta).dense()
        expected = x @ (layer.weight.double() + delta.double()).T
        if layer.bias is not None:
            expected += layer.bias.double()
        off = float((y[:16].double() - expected).abs().max() / expected.abs().max())
        if not off <= (0.5 if name == "gemlite" else TOLERANCE):
            raise ValueError(f"{layer.linear.name}: error {off:.3g}; nothing is timed")
    if not all(torch.equal(a, b) for a, b in zip(run(0), run(0), strict=True)):
        raise ValueError("two runs differ")


def measure(model: str, rows: int, letters: str, blocks: list[Block], rate: float) -> None:
    """Check and time the ways at one number of rows; one JSON line each."""
    costs = block_costs(MODELS[model])
    moved = {"base": costs["base MB"], "ours": costs["base MB"] + costs["delta MB"]}
    sizes = {layer.linear.reads: layer.linear.n for layer in blocks[0]}
    inputs = {
        reads: torch.randn(rows, n, device=DEVICE, dtype=torch.bfloat16)
        for reads, n in sizes.items()
    }
    base = None
    for letter in letters:
        name, make = WAYS[letter]
        started = time.perf_counter()
        row: dict = {"model": model, "rows": rows, "way": name}
        try:
            run = make(blocks, inputs)
            check(name, run, blocks[0], inputs)
            found = time_graph(run, len(blocks))
        except Exception as error:
            print(json.dumps({**row, "ok": False, "error": last_lines(error)}), flush=True)
            continue
        median = statistics.median(found)
        base = median if name == "base" else base
        row |= {**spread(found), "of base": round(median / base, 3) if base else None}
        if name in moved and rows <= DECODE_ROWS:
            row["share of copy rate"] = round(moved[name] * 1e6 / median / rate, 3)
        row["preparing s"] = round(time.perf_counter() - started, 1)
        print(json.dumps(row), flush=True)


def copy_rate(size: int) -> float:
    """Bytes/s read and written by a copy of `size` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(time_graph(lambda _: target.copy_(source), 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ways", default="abcdefg", help="letters, see above; g: merged weights")
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.rows = "tiny", [1, 3]
    elif DEVICE.type == "cpu":
        raise SystemExit("no GPU: kernels/benchmarks/model.py prints what to expect of one")
    with torch.no_grad():
        rate = copy_rate(1 << (16 if options.tiny else 30))
        count = 1 if options.tiny else BLOCKS
        blocks = [
            [Layer(linear, seed) for linear in MODELS[options.model]] for seed in range(count)
        ]
        for rows in options.rows:
            measure(options.model, rows, options.ways, blocks, rate)


if __name__ == "__main__":
    main()
