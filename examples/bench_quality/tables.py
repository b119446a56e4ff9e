"""Tables of the report: records -> rows of text, the first row the header.

A missing record is a "–". Every table gets the records of all runs and those of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench_quality.plan import (
    DATA_FREE_PARTS,
    DELTA_COME,
    DELTAMIX,
    GROUPS,
    OURS,
    PAIRS,
    PARTS,
    SYNTHETIC,
    Run,
)

Record = dict[str, Any]
Pairs = dict[str, Record]
Rows = list[list[str]]
NONE = "–"
SHARES = (8, 16, 32, 64, 128)


def select(found: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records of 128 matched texts, unless `calibration` or `samples` say else."""
    wanted = {"calibration": "matched", "samples": 128} | wanted
    return [r for r in found if all(r[key] == value for key, value in wanted.items())]


def record_of(found: Iterable[Record], run: Run) -> Record | None:
    return next((r for r in found if (r["pair"], r["id"]) == (run.pair, run.id)), None)


def present(found: Iterable[Record], among: Sequence[str]) -> list[str]:
    """Pairs with records: the known ones in their order, then others (but no synthetic one)."""
    have = {record["pair"] for record in found}
    others = sorted(have - {*among, *PAIRS, *SYNTHETIC}) if among == PAIRS else []
    return [pair for pair in among if pair in have] + others


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(v, 1e-12)) for v in values) / len(values))


def ratios(found: Iterable[Record], pair: str, share: int, other: str) -> list[float]:
    """KL of ours / KL of `other`, for each seed both were run with."""
    ours, theirs = (
        {r["seed"]: r["figures"]["kl"] for r in select(found, pair=pair, share=share, label=label)}
        for label in (OURS, other)
    )
    return [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def kl_of(record: Record | None) -> str:
    return NONE if record is None else number(record["figures"]["kl"])


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def spread(values: Sequence[float], mean: float | None = None, percent: bool = False) -> str:
    """A mean and, if there are several, (least to most)."""
    if not values:
        return NONE
    show = (lambda v: f"{v:.2%}") if percent else number
    text = show(sum(values) / len(values) if mean is None else mean)
    return f"{text} ({show(min(values))} to {show(max(values))})" if len(values) > 1 else text


def gain_of(record: Record) -> float:
    """Share of the fine-tune's gain in NLL; without labels, of its KL."""
    return record["kept"].get("nll", record["kept"]["kl"])


def pairs(found: Sequence[Record], ends: Pairs) -> Rows:
    rows = [["pair", "rows", "tokens", "KL of base", "NLL base", "NLL tuned", "acc. base"]]
    rows[0] += ["acc. tuned"]
    for name, end in ends.items():
        base, tuned = end["base"], end["finetuned"]
        row = [name, str(end["questions"]), str(base["tokens"]), number(base["kl"])]
        rows.append(row + [number(e[key]) for key in ("nll", "accuracy") for e in (base, tuned)])
    return rows


def main(found: Sequence[Record], ends: Pairs) -> Rows:
    rows = [["ratio", "pair", OURS, DELTAMIX, DELTA_COME, "/ deltamix", "/ delta-come"]]
    for share in SHARES:
        means: dict[str, list[float]] = {DELTAMIX: [], DELTA_COME: []}
        for pair in present(found, PAIRS):
            row = []
            for label in (OURS, DELTAMIX, DELTA_COME):
                kls = [
                    r["figures"]["kl"] for r in select(found, pair=pair, share=share, label=label)
                ]
                row.append(number(sum(kls) / len(kls)) if kls else NONE)
            for other, mean in means.items():
                values = ratios(found, pair, share, other)
                mean += [geometric(values)] if values else []
                row.append(spread(values, geometric(values)) if values else NONE)
            if set(row) != {NONE}:
                rows.append([f"1/{share}", pair, *row])
        if all(means.values()):
            bold = [f"**{number(geometric(mean))}**" for mean in means.values()]
            rows.append([f"1/{share}", "**geometric mean**", "", "", "", *bold])
    return rows


def gain(found: Sequence[Record], ends: Pairs) -> Rows:
    rows = [["pair", "ratio", "gain kept", "agreement", "exact match kept"]]
    for pair in present(found, PAIRS):
        for share in SHARES:
            group = select(found, pair=pair, share=share, label=OURS)
            if group:
                exact = [r["kept"]["exact_match"] for r in group if "exact_match" in r["kept"]]
                agreement = [r["figures"]["agreement"] for r in group]
                gains = [gain_of(r) for r in group]
                row = [spread(values, percent=True) for values in (gains, agreement, exact)]
                rows.append([pair, f"1/{share}", *row])
    return rows


def data_free(found: Sequence[Record], ends: Pairs) -> Rows:
    cells = [
        (OURS, "none"),
        *((label, "none") for label in DATA_FREE_PARTS),
        (OURS, "matched"),
        (DELTA_COME, "none"),
        (DELTA_COME, "matched"),
    ]
    rows = [["pair", *(f"{label}, {kind}" for label, kind in cells)]]
    for pair in present(found, PAIRS):
        runs = [Run(pair, label, label, 16, calibration=kind) for label, kind in cells]
        rows.append([pair, *(kl_of(record_of(found, run)) for run in runs)])
    return [row for row in rows if set(row[1:]) != {NONE}]


def parts(found: Sequence[Record], ends: Pairs) -> Rows:
    known = [p for p in present(found, PAIRS) if record_of(found, Run(p, OURS, OURS, 32))]
    known = [p for p in known if any(r["label"] in PARTS for r in select(found, pair=p))]
    rows = [["changed", *known]]
    for label in PARTS if known else ():
        row = [label]
        for pair in known:
            one, whole = (record_of(found, Run(pair, name, OURS, 32)) for name in (label, OURS))
            row.append(NONE)
            if one and whole:
                row[-1] = number(one["figures"]["kl"] / whole["figures"]["kl"])
        rows.append(row)
    return rows


def calibration(found: Sequence[Record], ends: Pairs) -> Rows:
    known = present(found, PAIRS)
    kinds = [("none", 128), ("mismatched", 128)]
    kinds += [("matched", samples) for samples in (8, 32, 128, 512)]
    rows = [["texts", *known]]
    for kind, samples in kinds:
        row = [kind if kind != "matched" else f"matched, {samples}"]
        for pair in known:
            wanted = {"calibration": kind, "samples": samples, "share": 32, "label": OURS}
            row.append(spread([r["figures"]["kl"] for r in select(found, pair=pair, **wanted)]))
        rows.append(row)
    return [rows[0], *(row for row in rows[1:] if set(row[1:]) - {NONE})]


def baselines(found: Sequence[Record], ends: Pairs) -> Rows:
    known = present(found, PAIRS)
    names = list(dict.fromkeys((run.label, run.share) for run in GROUPS["baselines"][0](["any"])))
    names = [(label, share) for share in (16, 8) for label in (OURS, DELTAMIX, DELTA_COME)] + names
    rows = [["method", *known]]
    for label, share in names:
        row = [f"{label}, 1/{share}" if share else label]
        for pair in known:
            record = record_of(found, Run(pair, label, label, share))
            row.append(kl_of(record) + (f" ({record['ratio']:.4f})" if record else ""))
        rows.append(row)
    return [rows[0], *(row for row in rows[1:] if set(row[1:]) - {NONE})]


def tails(found: Sequence[Record], ends: Pairs) -> Rows:
    known = present(found, SYNTHETIC)
    rows = [["method", "ratio", *known]]
    for run in GROUPS["tails"][0](["any"]):
        row = [run.label, f"1/{run.share}"]
        for pair in known:
            record = record_of(found, Run(pair, run.label, run.label, run.share))
            row.append(NONE if record is None else number(1 - record["kept"]["kl"]))
        rows.append(row)
    return [rows[0], *(row for row in rows[1:] if set(row[2:]) - {NONE})]


def widths(found: Sequence[Record], ends: Pairs) -> Rows:
    rows = [["pair", "layer", "matrices", "rank", "of", "V bits", "U bits"]]
    for record in select(found, share=32, label=OURS, seed=0):
        for kind, entry in record["types"].items():
            bits = [f"{entry[key]:.2f}" for key in ("v_bits", "u_bits")]
            size = [f"{entry['rank']:.1f}", f"{entry['full_rank']:.0f}"]
            rows.append([record["pair"], f"`{kind}`", str(entry["matrices"]), *size, *bits])
    return rows


def seconds(found: Sequence[Record], ends: Pairs) -> Rows:
    chosen = [r for r in select(found, share=32, seed=0) if "stages" in r]
    chosen = [r for r in chosen if r["label"] in (OURS, DELTAMIX, DELTA_COME)]
    stages = list(dict.fromkeys(stage for r in chosen for stage in r["stages"]))
    rows = [["pair", "method", "total", *stages]]
    for record in chosen:
        spent = [record["stages"].get(stage) for stage in stages]
        row = [NONE if s is None else f"{s:.1f}" for s in (record["seconds"]["total"], *spent)]
        rows.append([record["pair"], record["label"], *row])
    return rows


def sizes(found: Sequence[Record], ends: Pairs) -> Rows:
    kinds = ("total", "payload", "scales", "metadata", "overlay")
    rows = [["pair", "method", "ratio", *kinds]]
    for record in select(found, share=32, seed=0):
        if record["label"] in (OURS, DELTAMIX, DELTA_COME):
            row = [f"{record['bytes'][kind] / 1000:.1f}" for kind in kinds]
            rows.append([record["pair"], record["label"], f"{record['ratio']:.5f}", *row])
    return rows
