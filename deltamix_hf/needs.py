"""How much memory and disk a compression takes that has one block in memory at a time.

Fitted to the peaks of single matrices of a 7B model (docs/results): 32000 x 4096 took 3.0 GB,
4096 x 11008 took 2.9 GB, of which 0.5 GB is the process itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .metric import SecondMoment

_PROCESS = 600_000_000
_PER_WEIGHT = 12  # the delta, its image in the metric, and factors, float32
_PER_METRIC = 14  # a full metric, its factor in float64 and what is made of it
_PREDICTIONS = 1_000_000_000


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {self.memory / 1e9:.1f} GB of memory and {self.disk / 1e9:.1f} GB of disk"


def needs(
    shapes: Mapping[str, tuple[int, int]],
    block: int,
    blocks: int,
    tokens: int,
    hidden: int,
    itemsize: int,
    chained: bool,
    result: int,
) -> Needs:
    """What compressing matrices of these [m, n] takes.

    Args:
        block: bytes of the largest block.
        blocks: how many there are.
        tokens: of all calibration batches; 0 without any.
        hidden: size of the hidden states, of `itemsize` bytes an element.
        chained: blocks are fitted one after the other, with exact input metrics.
        result: bytes of the delta.
    """
    calibrated = tokens > 0
    memory = disk = 0
    for m, n in shapes.values():
        job = _PER_WEIGHT * m * n
        for side, exact in ((m, False), (n, chained)):
            kept = SecondMoment(side)
            full = kept.kind == "full" or (exact and n < m * 4)
            if calibrated:
                job += _PER_METRIC * side * side if full else 2 * kept.nbytes
                disk += kept.nbytes
        memory = max(memory, job)
    if calibrated:
        widest = max((n for m, n in shapes.values() if n < m * 4), default=0)
        memory = max(memory, (2 if chained else 1) * block + 8 * widest * widest)
        states = tokens * hidden * itemsize
        disk += states * (blocks + 4) + 12 * states + block + _PREDICTIONS
    return Needs(_PROCESS + memory, disk + 2 * result)
