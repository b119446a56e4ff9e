"""Check, then time, a decoder block whose rows have deltas of their own, on a GPU.

    python kernels/benchmarks/tenants.py [--model Llama-3-8B] [--json FILE]

A batch of 16 rows over 1, 4 and 16 deltas, by the grouped kernels in one CUDA graph, against the
base products alone; memory as torch counts it; and how long the packed tensors of a whole model
take from pinned host memory. One graph serves all spreads of tenants: only tables change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from bench import CACHE, TOLERANCE, Layer, time_graph
from deltamix_kernels import Rows, Table, grouped_add
from model import block_costs
from shapes import BLOCKS, MODELS, delta_bytes, runs
from torch import Tensor

ROWS = 16
SPREADS = (1, 4, 16)


class Grouped:
    """One linear layer of a block, with `max(SPREADS)` deltas in its table."""

    def __init__(self, layer: Layer, seed: int):
        self.layer = layer
        m, n = layer.weight.shape
        self.table = Table(max(SPREADS), m, n, layer.weight.device)
        self.deltas = [layer] + [
            Layer(layer.linear, 1000 * seed + i) for i in range(1, max(SPREADS))
        ]
        for slot, delta in enumerate(self.deltas):
            if slot:
                del delta.weight, delta.right, delta.left  # only its factors are wanted
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
    return Rows(*(torch.tensor(n, dtype=torch.int32, device="cuda") for n in numbers))


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
                raise SystemExit(f"{name}, {tenants} tenants: error {off:.3g}; nothing is timed")


def hot_load(name: str) -> dict[str, float]:
    """Seconds to bring the packed tensors of a whole model from pinned memory."""
    host = []
    for _ in range(BLOCKS[name]):
        for linear in MODELS[name]:
            size = delta_bytes(linear, runs(linear))
            host += [torch.empty(n, dtype=torch.uint8).pin_memory() for n in (size // 2,) * 2]
    spent = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        placed = [t.to("cuda", non_blocking=True) for t in host]
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        del placed
    return {"bytes": sum(t.numel() for t in host), "seconds": statistics.median(spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=BLOCKS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: docs/results/tenants.md has the figures of a CPU")
    linears, costs = MODELS[options.model], block_costs(MODELS[options.model])
    count = max(2, int(CACHE // (costs["base MB"] * 1e6)) + 1)
    before = torch.cuda.memory_allocated()
    layers = [[Layer(linear, seed) for linear in linears] for seed in range(count)]
    blocks = [[Grouped(layer, seed) for layer in block] for seed, block in enumerate(layers)]
    inputs = {
        layer.linear.reads: torch.randn(ROWS, layer.linear.n, device="cuda", dtype=torch.bfloat16)
        for layer in layers[0]
    }
    rows = {tenants: rows_over(tenants) for tenants in SPREADS}
    for tenants in SPREADS:
        check(blocks[0], inputs, rows[tenants], tenants)
    base = time_graph(
        lambda i: [F.linear(inputs[x.linear.reads], x.weight, x.bias) for x in layers[i]], count
    )
    middle = statistics.median(base)
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": options.model,
        "rows": ROWS,
        "base seconds": base,
        "allocated": torch.cuda.memory_allocated() - before,
        "hot load": hot_load(options.model),
        "tenants": {},
    }
    print(f"{found['device']}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{options.model}, {ROWS} rows, one block: base {middle * 1e6:.1f} us")
    for tenants in SPREADS:
        seconds = time_graph(
            lambda i, r=rows[tenants]: [g(inputs[g.layer.linear.reads], r) for g in blocks[i]],
            count,
        )
        floor = 1 + tenants * costs["delta MB"] / costs["base MB"]
        found["tenants"][tenants] = seconds
        print(
            f"{tenants:3d} tenants {statistics.median(seconds) * 1e6:9.1f} us, "
            f"{statistics.median(seconds) / middle:.3f} x base (floor by bytes {floor:.3f})",
            flush=True,
        )
    load = found["hot load"]
    print(f"hot load: {load['bytes'] / 1e6:.0f} MB in {load['seconds'] * 1e3:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
