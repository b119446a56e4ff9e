"""Plots of the report, PNG. A plot without records is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
from bench_quality.plan import DELTA_COME, DELTAMIX, OURS, PAIRS
from bench_quality.tables import Record, present, select
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

OWN = (OURS, DELTAMIX, DELTA_COME)


def _panels(count: int, title: str) -> tuple[Figure, list]:
    figure, axes = plt.subplots(1, count, figsize=(4.8 * count, 4.2), squeeze=False)
    figure.suptitle(title)
    return figure, list(axes[0])


def kl_against_bytes(found: Sequence[Record]) -> Figure | None:
    """One panel a pair; own methods are lines over the ratios, the others single points."""
    chosen = [r for r in select(found, seed=0) if not r["switches"]]
    known = present(chosen, PAIRS)
    if not known:
        return None
    figure, panels = _panels(len(known), "KL to the fine-tune against true bytes (seed 0)")
    others = sorted({r["label"] for r in chosen} - set(OWN))
    colours = {label: f"C{i}" for i, label in enumerate(OWN)}  # of C0 to C9
    colours |= {label: plt.get_cmap("tab20b")(i / len(others)) for i, label in enumerate(others)}
    drawn: dict[str, Any] = {}
    for pair, axes in zip(known, panels, strict=True):
        labels = {r["label"] for r in chosen if r["pair"] == pair}
        for label in (label for label in colours if label in labels):
            group = select(chosen, pair=pair, label=label)
            points = sorted((r["bytes"]["total"] / 1e6, r["figures"]["kl"]) for r in group)
            style = {"label": label, "color": colours[label]}
            mark = "o-" if label in OWN else "x:"
            drawn[label], *_ = axes.plot(*zip(*points, strict=True), mark, **style)
        axes.set(xscale="log", yscale="log", title=pair, xlabel="MB of weight files")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("KL, nats per token")
        axes.grid(True, which="both", alpha=0.3)
    lines = [drawn[label] for label in colours if label in drawn]
    panels[-1].legend(handles=lines, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def kl_against_calibration(found: Sequence[Record]) -> Figure | None:
    """Matched texts as a line, the other kinds of data as levels."""
    chosen = [r for r in found if r["share"] == 32 and r["label"] == OURS]
    known = present(chosen, PAIRS)
    if not known:
        return None
    figure, panels = _panels(len(known), f"{OURS} at 1/32: KL against calibration texts")
    for pair, axes in zip(known, panels, strict=True):
        group = [r for r in chosen if r["pair"] == pair]
        sizes = sorted({r["samples"] for r in group if r["calibration"] == "matched"})
        if sizes:
            axes.plot(sizes, [_mean(group, "matched", n) for n in sizes], "o-", label="matched")
        for kind, style in (("mismatched", "--"), ("none", ":")):
            if any(r["calibration"] == kind for r in group):
                axes.axhline(_mean(group, kind, 128), linestyle=style, color="gray", label=kind)
        axes.set(xscale="log", yscale="log", title=pair, xlabel="texts (at most)")
        axes.set_ylabel("KL, nats per token")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _mean(group: Sequence[Record], kind: str, samples: int) -> float:
    values = [r["figures"]["kl"] for r in select(group, calibration=kind, samples=samples)]
    return sum(values) / len(values)


def widths(found: Sequence[Record]) -> Figure | None:
    """Share of the full rank that is kept by type of layer, and the mean widths of its ranks."""
    chosen = [r for r in select(found, share=32, seed=0, label=OURS) if r["pair"] in PAIRS]
    if not chosen:
        return None
    figure, panels = _panels(len(chosen), f"{OURS} at 1/32: ranks and widths by type of layer")
    for record, axes in zip(chosen, panels, strict=True):
        kinds, entries = list(record["types"]), list(record["types"].values())
        places = range(len(kinds))
        axes.barh(places, [e["rank"] / e["full_rank"] for e in entries], color="lightgray")
        axes.set_yticks(places, kinds, fontsize=7)
        axes.set(title=record["pair"], xlabel="share of the full rank (bars)")
        upper = axes.twiny()
        for side, mark in (("v_bits", ">"), ("u_bits", "<")):
            upper.plot([e[side] for e in entries], places, mark, label=side.replace("_", " "))
        upper.set(xlabel="mean width in bits (marks)", xlim=(0, 8))
        upper.legend(fontsize=7)
    return figure


def seconds(found: Sequence[Record]) -> Figure | None:
    """Stages of one compression, one bar a pair and method."""
    chosen = [r for r in select(found, share=32, seed=0) if r["label"] in OWN]
    chosen = [r for r in chosen if r["pair"] in PAIRS]
    if not chosen:
        return None
    figure, (axes,) = _panels(1, "Seconds by stage, 1/32")
    figure.set_size_inches(8, 1 + 0.4 * len(chosen))
    names = [f"{r['pair']}, {r['label']}" for r in chosen]
    left = [0.0] * len(chosen)
    for stage in dict.fromkeys(stage for r in chosen for stage in r["stages"]):
        spent = [r["stages"].get(stage, 0.0) for r in chosen]
        axes.barh(names, spent, left=left, label=stage)
        left = [a + b for a, b in zip(left, spent, strict=True)]
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PLOTS: tuple[Callable[[Sequence[Record]], Figure | None], ...] = (
    kl_against_bytes,
    kl_against_calibration,
    widths,
    seconds,
)


def draw(found: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Save every plot that has records; returns name -> file."""
    drawn = {}
    for plot in PLOTS:
        if figure := plot(found):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"quality_{plot.__name__}.png"
            figure.tight_layout()
            figure.savefig(path, dpi=100)
            plt.close(figure)
            drawn[plot.__name__] = path
    return drawn
