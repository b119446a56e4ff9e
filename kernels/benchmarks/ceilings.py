"""What this GPU can do: copies, the vendor's products at real shapes, launches. One JSON line each.

Products take their weights in turn from as many sets as it takes to leave none in the L2 cache, in
one CUDA graph. `share` is of the rate at which a large copy moves bytes.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import tell
from shapes import MODELS
from timing import DEVICE, spread, synchronize, time_graph, time_host

ROWS = (1, 16, 2048)
SETS, CACHE = 8, 120e6  # sets of weights at least, and bytes of them


@triton.jit
def _one(x):
    tl.store(x + tl.program_id(0), 1.0)


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def copies(largest: int) -> float:
    """Bytes/s read and written by the largest copy."""
    rate = 0.0
    for size in (largest // 64, largest // 8, largest):
        source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        found = time_graph(lambda _, s=source, t=target: t.copy_(s), 2)
        rate = 2 * size / median(found)
        tell(what="copy", MB=size / 1e6, GBps=round(rate / 1e9, 1), **spread(found))
    # reading alone: what a product at one row does
    source = torch.randn(largest // 4, device=DEVICE)
    found = time_graph(lambda _: source.sum(), 2)
    tell(what="sum", MB=largest / 1e6, GBps=round(largest / median(found) / 1e9, 1))
    return rate


def products(model: str, rows_list: tuple[int, ...], rate: float) -> None:
    """F.linear by shape, then the whole block of them, at each number of rows."""
    linears = MODELS[model]
    shapes = sorted({(linear.m, linear.n) for linear in linears})
    weights = {}
    for m, n in shapes:
        count = max(SETS, int(CACHE // (2 * m * n)) + 1)
        weights[m, n] = [
            torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16) / n**0.5 for _ in range(count)
        ]
    for rows in rows_list:
        xs = {n: torch.randn(rows, n, device=DEVICE, dtype=torch.bfloat16) for _, n in shapes}
        for (m, n), sets in weights.items():
            found = time_graph(lambda i, s=sets, x=xs[n]: F.linear(x, s[i]), len(sets))
            moved = 2 * (m * n + rows * (m + n))
            tell(
                what="linear",
                rows=rows,
                shape=[m, n],
                share=round(moved / median(found) / rate, 3),
                TFLOPs=round(2 * rows * m * n / median(found) / 1e12, 1),
                **spread(found),
            )

        def block(i: int, xs: dict = xs) -> list:
            used = [(linear, weights[linear.m, linear.n]) for linear in linears]
            return [F.linear(xs[li.n], sets[(7 * i + j) % SETS]) for j, (li, sets) in
                    enumerate(used)]  # fmt: skip

        found = time_graph(block, SETS)
        moved = sum(linear.base_bytes + 2 * rows * (linear.m + linear.n) for linear in linears)
        tell(
            what="block of linears",
            model=model,
            rows=rows,
            share=round(moved / median(found) / rate, 3),
            **spread(found),
        )


def launches(count: int) -> None:
    """The gap between empty kernels of a graph, and what a launch takes on the host."""
    x = torch.zeros(1024, device=DEVICE)
    weight = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    row = torch.randn(1, 64, device=DEVICE, dtype=torch.bfloat16)
    _one[(1,)](x)
    synchronize()
    for grid in (1, 132):
        found = time_graph(lambda _, g=grid: _one[(g,)](x), count)
        tell(what="graph gap", kernel="Triton, empty", programs=grid, **spread(found))
    calls = max(2, count)
    for what, run in (
        ("Triton launch", lambda: _one[(1,)](x)),
        ("torch add_", lambda: x.add_(1)),
        ("F.linear 64 x 64", lambda: F.linear(row, weight)),
    ):
        tell(what="host", of=what, us=round(1e6 * time_host(run, calls), 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    with torch.inference_mode():
        rate = copies(1 << (16 if tiny else 30))
        products("tiny" if tiny else "Llama-3-8B", (1, 4) if tiny else ROWS, rate)
        launches(2 if tiny else 200)


if __name__ == "__main__":
    main()
