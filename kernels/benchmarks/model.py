"""Bytes and launches of one decoder block at batch 1: what is the least the delta can cost.

    python kernels/benchmarks/model.py

The floor of (base + delta) / base is (base bytes + delta bytes) / base bytes; every launch beyond
the base's own adds a gap. Bandwidth and gap are assumptions of this table, named in it; the
benchmark measures.
"""

from __future__ import annotations

from shapes import MODELS, Linear, delta_bytes, runs

BANDWIDTH = 3.35e12  # bytes/s, H100 SXM's data sheet
GAP = 1.0e-6  # s between two kernels of a CUDA graph
TARGET = 1.12


def block_costs(linears: list[Linear]) -> dict[str, float]:
    """Bytes, launches and times of a block, one row of x."""
    base = sum(linear.base_bytes for linear in linears)
    delta = sum(delta_bytes(linear, runs(linear)) for linear in linears)
    launches = len(linears)  # expand carries the base product
    shrinks = len({linear.reads for linear in linears})
    time = base / BANDWIDTH + launches * GAP
    ours = (base + delta) / BANDWIDTH + (launches + shrinks) * GAP
    return {
        "base MB": base / 1e6,
        "delta MB": delta / 1e6,
        "base launches": launches,
        "our launches": launches + shrinks,
        "base us": time * 1e6,
        "ours us": ours * 1e6,
        "floor by bytes": (base + delta) / base,
        "predicted": ours / time,
        "target": TARGET,
    }


def main() -> None:
    print(f"assumed: {BANDWIDTH / 1e12} TB/s, {GAP * 1e6} us a launch; one block, one row\n")
    rows = {name: block_costs(linears) for name, linears in MODELS.items()}
    columns = next(iter(rows.values()))
    print("| model | " + " | ".join(columns) + " |")
    print("|---" + "|---:" * len(columns) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
