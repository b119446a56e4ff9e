"""Check, then time, a decoder block whose rows have deltas of their own, on a GPU.

    python kernels/benchmarks/tenants.py [--model Llama-3-8B]

A batch of 16 rows over 1, 4 and 16 deltas, by the grouped kernels in one CUDA graph, against the
base products alone, and memory as torch counts it. One graph serves all spreads of tenants: only
tables change. Prints one JSON line for each figure, as soon as it is there.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from bench import DTYPE, LOOPS, TOLERANCE, Group
from cases import last_lines, tell
from deltamix_kernels import Rows, Table, grouped_add
from factors import TINY, groups, kernel_form, layer_factors
from shapes import MODELS, Linear, bytes_of
from timing import DEVICE, spread, time_graph
from torch import Tensor

ROWS = 16
SPREADS = (1, 4, 16)
SETS = 2  # blocks whose weights take turns, 16 deltas each


class Grouped:
    """Layers of one input; each has a table of `max(SPREADS)` deltas, the first being its own."""

    def __init__(self, group: Group, seed: int):
        self.group, self.deltas, self.tables = group, [], []
        for linear, own in zip(group.linears, group.factors, strict=True):
            others = range(1, max(SPREADS))
            deltas = [own, *(layer_factors(linear, DEVICE, 1000 * seed + i) for i in others)]
            table = Table(max(SPREADS), linear.m, linear.n, DEVICE)
            for slot, delta in enumerate(deltas):
                assert table.put(slot, kernel_form(delta), DTYPE)
            self.deltas.append(deltas)
            self.tables.append(table)

    def __call__(self, x: Tensor, rows: Rows) -> list[Tensor]:
        outputs = self.group.base(x)
        for y, table, bias in zip(outputs, self.tables, self.group.biases, strict=True):
            grouped_add(y, x, table, rows, bias)
        return outputs

    def check(self, x: Tensor, rows: Rows, tenants: int) -> None:
        """Raise ValueError if a row is not within TOLERANCE of float64."""
        group, found = self.group, self(x, rows)
        for y, w, b, deltas, linear in zip(
            found, group.weights, group.biases, self.deltas, group.linears, strict=True
        ):
            for i in range(ROWS):
                delta = deltas[i * tenants // ROWS].dense().double()
                expected = x[i].double() @ (w.double() + delta).T
                if b is not None:
                    expected += b.double()
                off = float((y[i].double() - expected).abs().max() / expected.abs().max())
                if not off <= TOLERANCE:
                    raise ValueError(f"{linear.name}, row {i}: error {off:.3g}; nothing is timed")


def rows_over(tenants: int) -> Rows:
    """`ROWS` rows in equal shares; slots past those in use have no rows."""
    share = ROWS // tenants
    starts = [min(i * share, ROWS) for i in range(ROWS + 1)]
    numbers = [list(range(ROWS)), starts, list(range(ROWS))]
    return Rows(*(torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in numbers))


def measure(linears: list[Linear], count: int, spreads: tuple[int, ...]) -> None:
    (weights, deltas), some = bytes_of(linears), groups(linears)
    blocks = [
        [Grouped(Group(each, 10 * seed + i), 10 * seed + i) for i, each in enumerate(some)]
        for seed in range(count)
    ]
    inputs = {one.reads: torch.randn(ROWS, one.n, device=DEVICE, dtype=DTYPE) for one, *_ in some}
    base = time_graph(
        lambda i: [one.group.base(inputs[one.group.reads]) for one in blocks[i]], count, LOOPS
    )
    tell(rows=ROWS, tenants=0, **spread(base))
    if DEVICE.type == "cuda":
        tell(allocated=torch.cuda.memory_allocated(), blocks=count, tenants=16)
    for tenants in spreads:
        row, rows = {"rows": ROWS, "tenants": tenants}, rows_over(tenants)
        try:
            for one in blocks[0]:
                one.check(inputs[one.group.reads], rows, tenants)
            seconds = time_graph(
                lambda i, r=rows: [one(inputs[one.group.reads], r) for one in blocks[i]],
                count,
                LOOPS,
            )
        except Exception as error:
            tell(**row, ok=False, error=last_lines(error))
            continue
        floor = 1 + tenants * deltas / weights
        ratio = statistics.median(seconds) / statistics.median(base)
        figures = {"of base": round(ratio, 3), "floor by bytes": round(floor, 3)}
        tell(**row, **figures, **spread(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=MODELS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    options = parser.parse_args()
    linears, count, spreads = MODELS[options.model], SETS, SPREADS
    if options.tiny:
        linears, count, spreads = TINY[3:4], 1, (4,)
    elif DEVICE.type == "cpu":
        raise SystemExit("no GPU: docs/results/tenants.md has the figures of a CPU")
    tell(model=options.model, tiny=options.tiny)
    with torch.no_grad():
        measure(linears, count, spreads)


if __name__ == "__main__":
    main()
