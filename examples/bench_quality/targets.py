"""The targets of the quality benchmark, each with what was measured and pass or fail."""

from __future__ import annotations

from collections.abc import Sequence

from bench_quality.plan import DELTA_COME, DELTAMIX, OURS, PAIRS, Run
from bench_quality.tables import (
    NONE,
    Pairs,
    Record,
    Rows,
    gain_of,
    geometric,
    number,
    present,
    ratios,
    record_of,
    select,
)


def targets(found: Sequence[Record], ends: Pairs) -> Rows:
    rows = [["target", "measured", "", "worst pair", ""]]
    known = present(found, PAIRS)
    for other, limit in ((DELTAMIX, 0.40), (DELTA_COME, 0.30)):
        for share in (16, 32, 64):
            by_pair = {pair: ratios(found, pair, share, other) for pair in known}
            title = f"KL / KL of {other} at 1/{share} ≤ {limit:.2f}"
            rows.append(_at_most(title, limit, by_pair))
    by_pair = {
        pair: [
            ours["figures"]["kl"] / theirs["figures"]["kl"]
            for ours in select(found, pair=pair, label=OURS, share=32)
            for theirs in select(found, pair=pair, label=DELTAMIX, share=16, seed=ours["seed"])
        ]
        for pair in known
    }
    rows.append(_at_most("KL at 1/32 / KL of deltamix at 1/16 ≤ 1", 1.0, by_pair))
    for share, least in ((16, 0.99), (32, 0.97)):
        rows.append(_gain(found, known, share, least))
    by_pair = {}
    for pair in known:
        ours = record_of(found, Run(pair, OURS, OURS, 16, calibration="none"))
        theirs = record_of(found, Run(pair, DELTA_COME, DELTA_COME, 16))
        both = [ours["figures"]["kl"] / theirs["figures"]["kl"]] if ours and theirs else []
        by_pair[pair] = both
    rows.append(
        _at_most("KL without data / KL of calibrated delta-come at 1/16 ≤ 0.70", 0.70, by_pair)
    )
    return rows


def _at_most(title: str, limit: float, by_pair: dict[str, list[float]]) -> list[str]:
    means = {pair: geometric(values) for pair, values in by_pair.items() if values}
    if not means:
        return [title, NONE, "no record yet", NONE, ""]
    mean, worst = geometric(list(means.values())), max(means, key=lambda pair: means[pair])
    verdicts = [_verdict(value <= limit) for value in (mean, means[worst])]
    return [title, number(mean), verdicts[0], f"{number(means[worst])} {worst}", verdicts[1]]


def _gain(found: Sequence[Record], known: Sequence[str], share: int, least: float) -> list[str]:
    title = f"gain kept at 1/{share} ≥ {least:.0%}"
    groups = {pair: select(found, pair=pair, label=OURS, share=share) for pair in known}
    means = {p: sum(map(gain_of, group)) / len(group) for p, group in groups.items() if group}
    if not means:
        return [title, NONE, "no record yet", NONE, ""]
    mean = sum(means.values()) / len(means)
    worst = min(means, key=lambda pair: means[pair])
    verdicts = [_verdict(value >= least) for value in (mean, means[worst])]
    return [title, f"{mean:.2%}", verdicts[0], f"{means[worst]:.2%} {worst}", verdicts[1]]


def _verdict(passed: bool) -> str:
    return "pass" if passed else "**fail**"
