"""Predict a Llama-3-8B layer with a delta from its bytes and counts, beside what was measured.

    python kernels/benchmarks/model.py

What one H200 measured (docs/results/gpu.md) is split into the base's product and what the delta
adds. The latter is scaled by the machine code's counts, of now (compiled and counted here by
sass.py, a minute) over those of the measured code: it is bound by issue and latency, not by bytes.
A change of anything else, say of how much is in flight, does not show here.
"""

from __future__ import annotations

from typing import NamedTuple

import sass
from deltamix_kernels.layout import rank_count
from shapes import MODELS, runs

COPY = 4.07e12  # bytes/s, measured
RATE = 7.3e14  # bf16 operations/s of 2048 rows, measured: 7.0e14 to 8.1e14


class Counts(NamedTuple):
    """Warp instructions a byte of codes: loops of the fused launch; mean of shrink and expand."""

    fused: float
    grouped: float

    @classmethod
    def now(cls) -> Counts:
        layer = sass.layer(90)
        return cls(layer["fused, loops"], (layer["shrink"] + layer["expand"]) / 2)


class Measured(NamedTuple):
    """Microseconds of a layer: seven F.linear, our launches without and with the delta."""

    base: float
    fused_base: float
    whole: float  # shrink, then the fused launch by dependent launch


THEN = Counts(0.510, 0.444)  # of the measured code
MEASURED = {
    1: Measured(136.78, 122.48, 158.75),
    4: Measured(135.99, 122.97, 164.19),
    16: Measured(134.81, 141.61, 189.9),
}
TENANTS = 134.55, 586.54  # 16 rows: the base, and over 16 deltas
PREFILL = 1330.53, 1907.53  # 2048 rows
TARGETS = {"1 row": 1.10, "4 rows": None, "16 rows": 1.13, "16 tenants": 2.3, "2048 rows": 1.45}


def decode(rows: int, now: Counts) -> tuple[float, float, float]:
    """(predicted, measured, relative uncertainty) multiple of the base."""
    found = MEASURED[rows]
    added = now.fused / THEN.fused * (found.whole - found.fused_base)
    # what is scaled may be off by 40 %, as it was before
    return (
        (found.fused_base + added) / found.base,
        found.whole / found.base,
        0.4 * added / (found.fused_base + added),
    )


def tenants(now: Counts) -> tuple[float, float, float]:
    """The same of 16 rows, each with a delta of its own."""
    base, whole = TENANTS
    added = now.grouped / THEN.grouped * (whole - base)
    return (base + added) / base, whole / base, 0.4 * added / (base + added)


def prefill(rows: int = 2048) -> tuple[float, float, float]:
    """The same by bytes and operations: dequantized factors and two more products, or merged."""
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
    return 1 + 1e6 * extra / PREFILL[0], PREFILL[1] / PREFILL[0], 0.1


def main() -> None:
    now = Counts.now()
    rows = {f"{r} row{'s' * (r > 1)}": decode(r, now) for r in MEASURED}
    rows |= {"16 tenants": tenants(now), "2048 rows": prefill()}
    print(f"counted: {now}")
    print("| | predicted | ± | measured | target |\n|---|---:|---:|---:|---:|")
    for name, (predicted, measured, off) in rows.items():
        target = "" if TARGETS[name] is None else f"{TARGETS[name]:.2f}"
        print(f"| {name} | {predicted:.2f} | {predicted * off:.2f} | {measured:.2f} | {target} |")


if __name__ == "__main__":
    main()
