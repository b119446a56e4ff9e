"""Draws docs/images/ from docs/results/: `python docs/pictures.py`. Nothing here is made up.

overview.png  what a delta repo is, and memory of one base with many deltas, as measured
budget.png    KL to the fine-tune against the budget, three real pairs

allocation.png and spectrum.png are what `deltamix inspect --plot` draws of `make demo`'s delta.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DOCS = Path(__file__).parent
PAIRS = ("rxnfp", "pocket-shakespeare", "smollm2-mixed")
METHODS = {"deltamix-kl": "#0072b2", "deltamix": "#e69f00", "delta-come": "#999999"}
SHARES = (8, 16, 32, 64, 128)
BLUE, GREY, GREEN = "#0072b2", "#bbbbbb", "#009e73"


def overview() -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[6, 4])
    left.set(xlim=(0, 12.2), ylim=(0, 5.4))
    left.set_axis_off()
    _box(left, 0.1, 1.4, 2.2, 3.2, GREY, "fine-tune\n$W_{ft}$\n16 bits")
    _box(left, 3.1, 1.4, 2.2, 3.2, "#dddddd", "base\n$W$\n16 bits,\nfrozen")
    left.text(2.7, 3, "−", ha="center", va="center", fontsize=20)
    left.text(6.35, 3, "= ΔW ≈", ha="center", va="center", fontsize=13)
    x, y = 7.4, 4.6
    for width, bits in ((0.6, "8"), (0.45, "4"), (0.35, "3"), (0.25, "2")):
        _box(left, x, 1.4, width, 3.2, BLUE, "")
        left.text(x + width / 2, 1.1, bits, ha="center", va="center", fontsize=9)
        _box(left, 10.1, y - width, 1.7, width, GREEN, "")
        left.text(11.9, y - width / 2, bits, ha="left", va="center", fontsize=9)
        x, y = x + width + 0.1, y - width - 0.1
    left.text(8.4, 4.85, "Û", ha="center", fontsize=13)
    left.text(10.95, 4.85, "V̂", ha="center", fontsize=13)
    left.text(9.75, 3, "·", ha="center", va="center", fontsize=20)
    promise = "each rank has its own bits; 1/16 of the bytes in all"
    left.text(9.2, 0.4, promise, ha="center", fontsize=10)
    left.set_title("A delta repo stores ΔW alone, and the base stays as it is")
    _memory(right)
    return figure


def _box(axes: Axes, x: float, y: float, w: float, h: float, colour: str, text: str) -> None:
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="k")
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10)


def _memory(axes: Axes) -> None:
    rows = json.loads((DOCS / "results" / "tenants.json").read_text())["memory"]["rows"]
    rows = [row for row in rows if row["tenants"]]
    counts = [row["tenants"] for row in rows]
    for key, colour, label in (
        ("dense", GREY, "dense fine-tunes"),
        ("deltas", BLUE, "one base and deltas"),
    ):
        heights = [row[key] / 1e9 for row in rows]
        axes.plot(counts, heights, "o-", color=colour, label=label)
        axes.annotate(
            f"{heights[-1]:.2g} GB", (counts[-1], heights[-1]), (-6, 6),
            textcoords="offset points", ha="right",
        )  # fmt: skip
    axes.set(xlabel="fine-tunes of SmolLM2-135M in one process", ylabel="process memory, GB")
    axes.set_title("Memory, measured")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)


def budget() -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    records = _records()
    for axes, pair in zip(panels, PAIRS, strict=True):
        for method, colour in METHODS.items():
            points = {
                share: values for share in SHARES if (values := _kl(records, pair, method, share))
            }
            means = [math.exp(sum(map(math.log, v)) / len(v)) for v in points.values()]
            axes.plot(list(points), means, "o-", color=colour, label=method)
            axes.fill_between(
                list(points), [min(v) for v in points.values()], [max(v) for v in points.values()],
                color=colour, alpha=0.2,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=pair, xlabel="ratio of the bf16 bytes")
        axes.xaxis.set_major_locator(FixedLocator(SHARES))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"1/{share:g}"))
        axes.invert_xaxis()
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel("KL to the fine-tune, nats per token")
    panels[0].legend()
    return figure


def _records() -> list[dict[str, Any]]:
    paths = sorted((DOCS / "results" / "quality" / "runs").glob("*/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def _kl(records: list[dict[str, Any]], pair: str, method: str, share: int) -> list[float]:
    """KL of each seed, calibrated on 128 texts of the fine-tune's kind."""
    wanted = {
        "pair": pair,
        "label": method,
        "share": share,
        "calibration": "matched",
        "samples": 128,
    }
    return [
        record["figures"]["kl"]
        for record in records
        if not record["switches"] and all(record[key] == value for key, value in wanted.items())
    ]


def main() -> None:
    folder = DOCS / "images"
    folder.mkdir(exist_ok=True)
    for name, draw in {"overview": overview, "budget": budget}.items():
        draw().savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
