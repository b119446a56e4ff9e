"""Check, then time, a decoder block whose rows have deltas of their own, on a GPU.

    python kernels/benchmarks/tenants.py [--model Llama-3-8B]

A batch of 16 rows over 1, 4 and 16 deltas, by the grouped kernels in one CUDA graph, against the
base products alone; memory as torch counts it; and how long the packed tensors of a whole model
take from pinned host memory. One graph serves all spreads of tenants: only tables change. Prints
one JSON line for each figure, as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from bench import TOLERANCE, Layer
from cases import last_lines
from deltamix_kernels import Rows, Table, grouped_add
from model import block_costs
from shapes import BLOCKS, MODELS, delta_bytes, runs
from timing import DEVICE, spread, time_graph
from torch import Tensor

ROWS = 16
SPREADS = (1, 4, 16)
SETS = 2  # blocks whose weights take turns, 16 deltas each


class Grouped:
    """One linear layer of a block, with `max(SPREADS)` deltas in its table."""

    def __init__(self, layer: Layer, seed: int):
        self.layer = layer
        m, n = layer.weight.shape
        self.table = Table(max(SPREADS), m, n, layer.weight.device)
        others = range(1, max(SPREADS))
        self.deltas = [layer] + [Layer(layer.linear, 1000 * seed + i, False) for i in others]
        for slot, delta in enumerate(self.deltas):
            assert self.table.put(slot, delta.packed)

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        y = F.linear(x, self.layer.weight, self.layer.bias)
        grouped_add(y, x, self.table, rows, self.layer.bias)
        return y


def rows_over(tenants: int) -> Rows:
    """`ROWS` rows in equal shares; slots past those in use have no rows."""
    share = ROWS // tenants
    starts = [min(i * share, ROWS) for i in range(ROWS + 1)]
    numbers = [list(range(ROWS)), starts, list(range(ROWS))]
    return Rows(*(torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in numbers))


def check(block: list[Grouped], inputs: dict[str, Tensor], rows: Rows, tenants: int) -> None:
    for grouped in block:
        x = inputs[grouped.layer.linear.reads]
        y = grouped(x, rows).double()
        for i in range(ROWS):
            delta = grouped.deltas[i * tenants // ROWS].factors.dense().double()
            expected = x[i].double() @ (grouped.layer.weight.double() + delta).T
            if grouped.layer.bias is not None:
                expected += grouped.layer.bias.double()
            off = float((y[i] - expected).abs().max() / expected.abs().max())
            if not off <= TOLERANCE:
                name = grouped.layer.linear.name
                raise ValueError(f"{name}, row {i}: error {off:.3g}; nothing is timed")


def hot_load(name: str) -> dict[str, float]:
    """Time to bring the packed tensors of a whole model from pinned memory."""
    linears = MODELS[name] * BLOCKS[name]
    halves = [delta_bytes(linear, runs(linear)) // 2 for linear in linears for _ in range(2)]
    pool = torch.randint(256, (sum(halves),), dtype=torch.uint8).pin_memory()
    host = pool.split(halves)
    spent = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        placed = [t.to(DEVICE, non_blocking=True) for t in host]
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        del placed
    seconds = statistics.median(spent)
    return {"MB": round(len(pool) / 1e6), "ms": 1e3 * seconds, "GBps": len(pool) / seconds / 1e9}


def tell(**row: object) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=MODELS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    options = parser.parse_args()
    if options.tiny:
        options.model = "tiny"
    elif DEVICE.type == "cpu":
        raise SystemExit("no GPU: docs/results/tenants.md has the figures of a CPU")
    with torch.no_grad():
        measure(options.model, 1 if options.tiny else SETS, (1, 4) if options.tiny else SPREADS)


def measure(model: str, count: int, spreads: tuple[int, ...]) -> None:
    linears, costs = MODELS[model], block_costs(MODELS[model])
    layers = [[Layer(linear, seed) for linear in linears] for seed in range(count)]
    blocks = [[Grouped(layer, seed) for layer in block] for seed, block in enumerate(layers)]
    inputs = {
        layer.linear.reads: torch.randn(ROWS, layer.linear.n, device=DEVICE, dtype=torch.bfloat16)
        for layer in layers[0]
    }
    base = time_graph(
        lambda i: [F.linear(inputs[x.linear.reads], x.weight, x.bias) for x in layers[i]], count
    )
    middle = statistics.median(base)
    tell(model=model, rows=ROWS, tenants=0, **spread(base))
    if DEVICE.type == "cuda":
        tell(model=model, allocated=torch.cuda.memory_allocated(), blocks=count, tenants=16)
    for tenants in spreads:
        row = {"model": model, "rows": ROWS, "tenants": tenants}
        rows = rows_over(tenants)
        try:
            check(blocks[0], inputs, rows, tenants)
            seconds = time_graph(
                lambda i, r=rows: [g(inputs[g.layer.linear.reads], r) for g in blocks[i]], count
            )
        except Exception as error:
            tell(**row, ok=False, error=last_lines(error))
            continue
        floor = 1 + tenants * costs["delta MB"] / costs["base MB"]
        ratio = statistics.median(seconds) / middle
        figures = {"of base": round(ratio, 3), "floor by bytes": round(floor, 3)}
        tell(**row, **figures, **spread(seconds))
    if DEVICE.type == "cuda":
        tell(what="hot load", **hot_load(model))


if __name__ == "__main__":
    main()
