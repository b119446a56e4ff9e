"""What `run.py` runs, in order: the main table first, because a long run may be cut off.

Every run has an id made of what distinguishes it. A run that two groups share (the full method in
an ablation is a cell of the main table too) has one id and is done once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench_quality.baselines import METHODS

OURS, DELTAMIX, DELTA_COME = "deltamix-kl", "deltamix", "delta-come"
PAIRS = ("rxnfp", "pocket-shakespeare", "smollm2-mixed", "smollm2-shakespeare")
SYNTHETIC = ("pocket-noise", "pocket-lora", "pocket-sparse")
LONG = ("smollm2-shakespeare",)  # seed 0 only
SMALL = ("rxnfp", "pocket-shakespeare")  # compressed in minutes
# Held-out rows judged. An encoder scores one prediction a row, a language model each answer token.
QUESTIONS = {"rxnfp": 512}
DEFAULT_QUESTIONS = 192


# One part of the preset changed at a time.
PARTS: dict[str, dict[str, Any]] = {
    "no Fisher metric": {"fisher": False},
    "no metric at all": {"whiten": False, "fisher": False},
    "budget by matrix": {"allocation": "matrix", "split_widths": False},
    "one width a rank": {"split_widths": False},
    "min-max, groups of 128": {"codebook": "min-max", "group_size": 128},
    "groups of 128": {"group_size": 128},
    "no groups in embeddings": {"embedding_group_size": 0},
    "no target correction": {"correct_target": False},
    "no sequential target": {"sequential": False},
    "no unbiased gains": {"unbiased_gains": False, "drop_penalty": 1.0},
    "drop penalty 1": {"drop_penalty": 1.0},
    "drop penalty 2": {"drop_penalty": 2.0},
    "drop penalty 8": {"drop_penalty": 8.0},
    "no tuning": {"tune_steps": 0},
    "overlay in fp32": {"bf16_overlay": False},
    "width 1 too": {"bits": [0, 1, 2, 3, 4, 8]},
}
# The same, of what works without text only.
DATA_FREE_PARTS = {"no delta metric": {"delta_metric": 0.0}}


@dataclass(frozen=True)
class Run:
    """One compression that becomes one record.

    Attributes:
        label: what tables call the method.
        method: a method of `DeltaMixConfig`, or a baseline's name.
        share: the budget is 1/share of the bf16 bytes; None: the method has a size of its own.
        seed: draws the calibration texts.
        calibration: "matched" (the pair's own texts), "mismatched" or "none".
        samples: calibration texts at most.
        switches: of the method's, the ones that are changed.
    """

    pair: str
    label: str
    method: str
    share: int | None
    seed: int = 0
    calibration: str = "matched"
    samples: int = 128
    switches: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        size = "own-size" if self.share is None else f"1of{self.share}"
        texts = self.calibration + ("" if self.calibration == "none" else str(self.samples))
        name = re.sub(r"\W+", "-", self.label.lower())
        return f"{name}_{size}_{texts}_seed{self.seed}"


def main(pairs: Iterable[str]) -> Iterator[Run]:
    pairs = list(pairs)
    for seed, shares in ((0, (16, 32, 64)), (1, (16, 32, 64)), (2, (16, 32, 64)), (0, (8, 128))):
        for pair in pairs:
            for share in shares:
                for method in (OURS, DELTAMIX, DELTA_COME):
                    # headers and overlay of rxnfp are 1/71 of its bytes already
                    if (seed == 0 or pair not in LONG) and (pair, share) != ("rxnfp", 128):
                        yield Run(pair, method, method, share, seed)


def data_free(pairs: Iterable[str]) -> Iterator[Run]:
    for pair in pairs:
        yield Run(pair, OURS, OURS, 16, calibration="none")
        yield Run(pair, DELTA_COME, DELTA_COME, 16, calibration="none")
        for label, switches in DATA_FREE_PARTS.items():
            yield Run(pair, label, OURS, 16, calibration="none", switches=switches)


def parts(pairs: Iterable[str]) -> Iterator[Run]:
    for pair in pairs:
        yield Run(pair, OURS, OURS, 32)
        for label, switches in PARTS.items():
            yield Run(pair, label, OURS, 32, switches=switches)


def calibration(pairs: Iterable[str]) -> Iterator[Run]:
    for pair in pairs:
        for seed in (0, 1, 2) if pair == "pocket-shakespeare" else (0,):
            for samples in (8, 32, 128, 512):
                yield Run(pair, OURS, OURS, 32, seed, samples=samples)
            yield Run(pair, OURS, OURS, 32, seed, "mismatched")
            yield Run(pair, OURS, OURS, 32, seed, "none")


def baselines(pairs: Iterable[str]) -> Iterator[Run]:
    for pair in pairs:
        for name, method in METHODS.items():
            for share in (None,) if method.fixed_size else (16, 8):
                yield Run(pair, name, name, share)
        for name in ("deltatensors quantized", "deltatensors int4"):
            yield Run(pair, name, name, None)
        for share in (16, 8):
            yield Run(pair, "deltatensors sparse", "deltatensors sparse", share)
        yield Run(pair, "BitDelta distilled", "BitDelta distilled", None)


def tails(pairs: Iterable[str]) -> Iterator[Run]:
    for pair in pairs:
        for share in (16, 32):
            for method in (OURS, DELTAMIX, DELTA_COME, "DARE", "low rank"):
                yield Run(pair, method, method, share)


# Name -> the runs, and the pairs they are about when none are asked for.
GROUPS: dict[str, tuple[Callable[[Iterable[str]], Iterator[Run]], tuple[str, ...]]] = {
    "main": (main, PAIRS),
    "data-free": (data_free, PAIRS),
    "parts": (parts, SMALL),
    "calibration": (calibration, PAIRS),
    "baselines": (baselines, PAIRS),
    "tails": (tails, SYNTHETIC),
}


def plan(groups: Iterable[str], pairs: Iterable[str] | None = None) -> list[Run]:
    """All runs of these groups, each once; of these pairs only, if given."""
    asked = None if pairs is None else list(pairs)
    found: dict[tuple[str, str], Run] = {}
    for group in groups:
        runs, usual = GROUPS[group]
        synthetic = group == "tails"
        chosen = usual if asked is None else [p for p in asked if (p in SYNTHETIC) == synthetic]
        for run in runs(chosen):
            found.setdefault((run.pair, run.id), run)
    return list(found.values())
