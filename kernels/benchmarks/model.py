"""Predict a Llama-3-8B layer with a delta from its bytes, issue slots and measured launches.

    python kernels/benchmarks/model.py

What one H200 measured (docs/results/gpu.md, the second form of the kernels) is split into the base,
what the delta adds to the fused launch, and the part of shrink that nothing hides. The last two are
scaled by the machine code's counts, of now (compiled and counted here by sass.py, a minute) over
those of the measured form: they were bound by issue and latency, not by bytes. Nothing of the
present code was measured; the uncertainty is that of the scaling.
"""

from __future__ import annotations

from typing import NamedTuple

import sass
from deltamix_kernels.layout import rank_count
from shapes import MODELS, delta_bytes, runs

COPY = 4.08e12  # bytes/s, measured
RATE = 7.3e14  # bf16 operations/s of 2048 rows, measured: 6.8e14 to 7.8e14
ISSUE = 132 * 4 * 1.755e9  # warp instructions/s
# Counts of the measured form (commit 9baaebf), which is no more: the fused launch's loops, warp
# instructions a byte of codes; shrink at 8 bits, on whose tiles its time hangs, a weight and lane.
FUSED_THEN, SHRINK_THEN = 0.666, 9.1


class Measured(NamedTuple):
    """Microseconds of a layer: seven F.linear, the fused launch without and with the delta."""

    base: float
    fused_base: float
    whole: float  # shrink, then the fused launch by dependent launch
    fused: float | None  # the four fused launches one by one, with the delta


MEASURED = {
    1: Measured(131.6, 125.99, 157.29, 146.59),
    4: Measured(136.98, 127.19, 158.12, 146.48),
    16: Measured(139.57, 146.07, 206.25, None),
}
PREFILL_BASE = 1325.0  # 2048 rows, measured
TARGETS = {"1 row": 1.10, "4 rows": None, "16 rows": 1.13, "16 tenants": 2.3, "2048 rows": 1.45}


class Now(NamedTuple):
    """Counts of the code as it is: see FUSED_THEN; `grouped` are shrink's and expand's mean."""

    fused: float
    shrink: float
    grouped: float

    @classmethod
    def counted(cls) -> Now:
        layer = sass.layer(90)
        widest = sass.kernel_counts((8,), 1, 90)["shrink"].loops[0].weight
        return cls(layer["fused, loops"], widest, (layer["shrink"] + layer["expand"]) / 2)


def decode(rows: int, now: Now) -> tuple[float, float, float]:
    """(predicted, measured before, relative uncertainty) multiple of the base."""
    found = MEASURED[rows]
    fused = found.fused or found.fused_base + 0.66 * (found.whole - found.fused_base)  # as at 1 row
    delta, exposed = fused - found.fused_base, found.whole - fused
    added = now.fused / FUSED_THEN * delta + now.shrink / SHRINK_THEN * exposed
    # the scaled parts may be off by 40 %, as the counts' predictions were before
    return (
        (found.fused_base + added) / found.base,
        found.whole / found.base,
        0.4 * added / (found.fused_base + added),
    )


def tenants(now: Now, count: int = 16) -> tuple[float, float]:
    """(predicted, relative uncertainty) of one row for each of so many deltas."""
    codes = count * sum(delta_bytes(one, runs(one)) for one in MODELS["Llama-3-8B"])
    delta = 1e6 * max(codes / COPY, now.grouped * codes / ISSUE)
    base = MEASURED[16].base
    return (base + delta) / base, 0.4 * delta / (base + delta)


def prefill(rows: int = 2048) -> tuple[float, float]:
    """(predicted, relative uncertainty): dequantized factors and two more products, or merged."""
    extra = 0.0
    for one in MODELS["Llama-3-8B"]:
        layout = runs(one)
        rank, (m, n) = rank_count(tuple(layout)), (one.m, one.n)
        written = 2 * rank * (m + n)
        merged = rows > m * n // (m + n)
        operations = 2 * rank * (m * n if merged else rows * (m + n))
        # written, then read; the merged weight is read and written, y is when products are added
        moved = 2 * written + (4 * m * n if merged else 4 * rows * (m + rank))
        extra += operations / RATE + moved / COPY
    return 1 + 1e6 * extra / PREFILL_BASE, 0.1


def main() -> None:
    now = Now.counted()
    rows: list[tuple[str, float, float | None, float]] = [
        (f"{r} row{'s' * (r > 1)}", *decode(r, now)) for r in MEASURED
    ]
    for name, (predicted, off) in (("16 tenants", tenants(now)), ("2048 rows", prefill())):
        rows.append((name, predicted, None, off))
    print(f"counted: {now}")
    print("| | predicted | ± | measured, second form | target |\n|---|---:|---:|---:|---:|")
    for name, predicted, before, off in rows:
        told = "" if before is None else f"{before:.2f}"
        target = TARGETS[name]
        print(
            f"| {name} | {predicted:.2f} | {predicted * off:.2f} | {told} | "
            f"{'' if target is None else f'{target:.2f}'} |"
        )


if __name__ == "__main__":
    main()
