"""Bytes, launches and operations of a decoder block: what is the least the delta can cost.

    python kernels/benchmarks/model.py

A product takes the longer of its bytes at full bandwidth and its operations at full rate; each
launch adds a gap. `floor` is the ratio of (base + delta) to base without gaps. The rates are data
sheet values, named in the output: the benchmark measures, this is what to hold it against.
"""

from __future__ import annotations

from shapes import BLOCKS, MODELS, Linear, delta_bytes, runs

BANDWIDTH = 3.35e12  # bytes/s, H100 SXM's data sheet
RATE = 989e12  # bf16 operations/s, dense, the same
HOST = 5e10  # bytes/s from pinned memory, PCIe 5.0 x16 in practice
TENANTS = 16
GAP = 1.0e-6  # s between two kernels of a CUDA graph
# Rows of x -> the most that (base + delta) / base may be, for a whole block.
TARGETS: dict[int, float | None] = {1: 1.12, 4: None, 16: 1.15, 64: None, 2048: 1.60}


def block_costs(linears: list[Linear], rows: int = 1) -> dict[str, float]:
    """Bytes, launches and times; layers that read the same input share a launch of `shrink`."""
    base = delta = base_floor = ours_floor = 0.0
    for linear in linears:
        m, n, layout = linear.m, linear.n, runs(linear)
        rank, packed = sum(count for count, _, _ in layout), delta_bytes(linear, layout)
        activations = 2 * rows * (m + n)
        base_floor += _product(linear.base_bytes + activations, rows * m * n)
        # h, in float32, is written by one launch and read by the next
        more = packed + 2 * 4 * rows * rank
        operations = rows * (m * n + rank * (m + n))
        ours_floor += _product(linear.base_bytes + activations + more, operations)
        base, delta = base + linear.base_bytes, delta + packed
    launches = len(linears)  # expand carries the base product
    all_launches = launches + len({linear.reads for linear in linears})
    time, ours = base_floor + launches * GAP, ours_floor + all_launches * GAP
    return {
        "base MB": base / 1e6,
        "delta MB": delta / 1e6,
        "base launches": launches,
        "our launches": all_launches,
        "base us": time * 1e6,
        "ours us": ours * 1e6,
        "floor": ours_floor / base_floor,
        "predicted": ours / time,
    }


def tenant_costs(linears: list[Linear], deltas: int) -> tuple[float, float]:
    """(floor, predicted) ratio to the base of a block with a row for each of `deltas` deltas.

    Every delta is read once; shrink and expand are launches of their own in each layer.
    """
    costs = block_costs(linears, deltas)
    reading = deltas * costs["delta MB"] * 1e6 / BANDWIDTH
    base, gaps = costs["base us"] / 1e6, costs["base launches"] * GAP
    return 1 + reading / (base - gaps), 1 + (reading + 2 * gaps) / base


def _product(bytes_: int, multiply_adds: int) -> float:
    """Seconds at full bandwidth or rate."""
    return max(bytes_ / BANDWIDTH, 2 * multiply_adds / RATE)


def main() -> None:
    print(
        f"assumed: {BANDWIDTH / 1e12} TB/s, {RATE / 1e12:.0f} bf16 Tflop/s, "
        f"{HOST / 1e9:.0f} GB/s from the host, {GAP * 1e6} us a launch; nothing here is measured"
    )
    for name in BLOCKS:
        linears = MODELS[name]
        lines = [(1, f"{one.name} {one.m} x {one.n}", [one], None) for one in linears]
        lines += [(rows, "**block**", linears, target) for rows, target in TARGETS.items()]
        columns = block_costs(linears)
        print(f"\n{name}\n\n| rows | layer | {' | '.join(columns)} | target |")
        print("|---:|---" + "|---:" * (len(columns) + 1) + "|")
        for rows, layer, some, target in lines:
            cells = [f"{value:.4g}" for value in block_costs(some, rows).values()]
            limit = "" if target is None else f"{target:.2f}"
            print(f"| {rows} | {layer} | {' | '.join(cells)} | {limit} |")
        floor, predicted = tenant_costs(linears, TENANTS)
        load = BLOCKS[name] * columns["delta MB"] * 1e6 / HOST
        print(
            f"\n{TENANTS} rows over {TENANTS} deltas: {predicted:.2f} times the base "
            f"(floor {floor:.2f}), target 2.60. The model's delta from pinned memory: "
            f"{1e3 * load:.0f} ms, target 100 for 8B."
        )
    print(
        "\nWith the merged weights cached, 2048 rows cost what the base costs: 1.00, target 1.15.\n"
        "Target at one row: 3 times faster than the torch reference, whose time only a GPU tells."
    )


if __name__ == "__main__":
    main()
