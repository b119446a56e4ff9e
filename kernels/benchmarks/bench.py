"""Check, then time, a decoder block's linear layers with their deltas, on a GPU.

    python kernels/benchmarks/bench.py [--model Llama-3-8B] [--rows 1 4 16] [--json FILE]

Every way is timed over the whole block in one CUDA graph: (a) the base products alone, (b) base +
delta by our kernels, (c) by the torch reference, (d) base + dense bf16 factors of the same ranks
(the LoRA way), (e) base + a 1-bit dense delta (BitDelta), (f) base + a 2-bit dense delta by
gemlite, if installed. Weights of several blocks take turns, so that none is left in the cache. A
way's result is compared with float64 first; a wrong one is never timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from deltamix_kernels import DECODE_ROWS, Packed, delta_linear, finish_linear, shrink
from model import block_costs
from rivals import OneBit, gemlite_linear, lora
from shapes import MODELS, Linear, runs
from torch import Tensor

from deltamix_hf.ops import low_rank
from deltamix_hf.quantization.gptq import Rounded
from deltamix_hf.quantization.packed_delta import PackedDelta

ROWS = (1, 4, 16, 64, 2048)
CACHE = 120e6  # bytes of weights that must lie between two uses of the same one
TOLERANCE = 2e-2  # of the largest output, bfloat16


class Layer:
    """One linear layer with random base weight and packed delta, in every form that is timed."""

    def __init__(self, linear: Linear, seed: int):
        torch.manual_seed(seed)
        self.linear = linear
        m, n = linear.m, linear.n
        self.weight = torch.randn(m, n, device="cuda", dtype=torch.bfloat16) / n**0.5
        self.bias = torch.randn(m, device="cuda", dtype=torch.bfloat16) if linear.bias else None
        factors = self._random(runs(linear))
        tensors = factors.tensors
        layout = tuple(factors.runs)
        self.factors = factors
        self.packed = Packed(**tensors, zeros=None, runs=layout, m=m, n=n, group_sizes=(0, 0))
        self.right, self.left = (t.bfloat16() for t in (factors.right(), factors.left()))

    def _random(self, layout: list[tuple[int, int, int]]) -> PackedDelta:
        """Random codes; scales such that the delta's outputs are about a tenth of the base's."""
        sides = []
        for side, length in ((1, self.linear.n), (2, self.linear.m)):
            bits = torch.tensor([run[side] for run in layout for _ in range(run[0])], device="cuda")
            codes = torch.randint(256, (len(bits), length), device="cuda", dtype=torch.uint8)
            codes &= ((1 << bits) - 1).to(torch.uint8)[:, None]
            scales = torch.full((len(bits), 1), 0.3 / (length * len(bits)) ** 0.25, device="cuda")
            sides.append(Rounded(codes, scales.bfloat16().float(), None, 0, bits))
        return PackedDelta.pack(*sides)

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


def ways(blocks: list[list[Layer]], rows: int) -> dict[str, Callable[[int], list[Tensor]]]:
    """Name -> function of a block's number; inputs are the same for all."""
    inputs = {
        layer.linear.reads: torch.randn(rows, layer.linear.n, device="cuda", dtype=torch.bfloat16)
        for layer in blocks[0]
    }

    def each(run: Callable[[Layer, Tensor], Tensor]) -> Callable[[int], list[Tensor]]:
        return lambda i: [run(layer, inputs[layer.linear.reads]) for layer in blocks[i]]

    found = {
        "a base": each(lambda layer, x: F.linear(x, layer.weight, layer.bias)),
        "b ours": lambda i: ours(blocks[i], inputs),
        "c reference": each(lambda layer, x: layer.reference(x)),
        "d lora": each(lambda layer, x: lora(x, layer.weight, layer.bias, layer.right, layer.left)),
    }
    if rows > DECODE_ROWS:
        merged = [[layer.weight + layer.factors.dense().bfloat16() for layer in b] for b in blocks]
        found["b merged"] = lambda i: [
            F.linear(inputs[layer.linear.reads], weight, layer.bias)
            for layer, weight in zip(blocks[i], merged[i], strict=True)
        ]
    signs = [[OneBit(layer.factors.dense()) for layer in block] for block in blocks]
    found["e one bit"] = lambda i: [
        sign(inputs[layer.linear.reads], layer.weight, layer.bias)
        for layer, sign in zip(blocks[i], signs[i], strict=True)
    ]
    low_bit = [[gemlite_linear(layer.factors.dense().bfloat16()) for layer in b] for b in blocks]
    if low_bit[0][0] is not None:
        found["f gemlite"] = lambda i: [
            F.linear(inputs[layer.linear.reads], layer.weight, layer.bias)
            + product(inputs[layer.linear.reads])
            for layer, product in zip(blocks[i], low_bit[i], strict=True)
        ]
    check(found, blocks[0], inputs, signs[0])
    return found


def check(
    found: dict[str, Callable[[int], list[Tensor]]],
    block: list[Layer],
    inputs: dict[str, Tensor],
    signs: list[OneBit],
) -> None:
    """Raises if a way is not within TOLERANCE of float64 (gemlite rounds: within 50 %)."""
    for name, run in found.items():
        for layer, sign, y in zip(block, signs, run(0), strict=True):
            x = inputs[layer.linear.reads][:16].double()
            delta = layer.factors.dense().double()
            if name == "a base":
                delta = torch.zeros_like(delta)
            elif name == "e one bit":
                delta = sign.dense().double()
            expected = x @ (layer.weight.double() + delta).T
            if layer.bias is not None:
                expected += layer.bias.double()
            off = float((y[:16].double() - expected).abs().max() / expected.abs().max())
            if not off <= (0.5 if name == "f gemlite" else TOLERANCE):
                raise SystemExit(f"{name}, {layer.linear.name}: error {off:.3g}; nothing is timed")
    first, again = (found["b ours"](0) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise SystemExit("two runs of our kernels differ")


def time_graph(run: Callable[[int], object], blocks: int, repeats: int = 20) -> list[float]:
    """Seconds a block, one figure a replay of a CUDA graph over all blocks."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(blocks):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(blocks)]
    found = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / blocks)
    del kept
    return found[3:]


def copy_bandwidth() -> float:
    """Bytes/s read and written by a copy of 1 GB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(time_graph(lambda _: target.copy_(source), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default all")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: kernels/benchmarks/model.py prints what to expect of one")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy bandwidth": bandwidth,
    }
    print(f"{where['device']}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
    print(f"copy {bandwidth / 1e12:.2f} TB/s; microseconds a block, median (least to most)")
    results = []
    for name in options.model or MODELS:
        linears = MODELS[name]
        costs = block_costs(linears)
        moved = {"a base": costs["base MB"], "b ours": costs["base MB"] + costs["delta MB"]}
        count = max(2, int(CACHE // (costs["base MB"] * 1e6)) + 1)
        blocks = [[Layer(linear, seed) for linear in linears] for seed in range(count)]
        for rows in options.rows:
            base = None
            for way, run in ways(blocks, rows).items():
                seconds = time_graph(run, count)
                middle = statistics.median(seconds)
                base = base or middle
                share = moved[way] * 1e6 / middle / bandwidth if way in moved else None
                results.append({"model": name, "rows": rows, "way": way, "seconds": seconds})
                print(
                    f"{name:12s} rows {rows:5d}  {way:12s} {middle * 1e6:9.1f} "
                    f"({min(seconds) * 1e6:.1f} to {max(seconds) * 1e6:.1f})  "
                    f"{middle / base:6.3f} x base"
                    + (f"  {moved[way]:.0f} MB, {share:.0%} of copy bandwidth" if share else ""),
                    flush=True,
                )
        del blocks
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(where | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
