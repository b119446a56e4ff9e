"""How much memory and disk a compression takes that has one block in memory at a time.

Fitted to peaks of the process on one CPU (docs/results), of which the process itself is 0.6 GB:
compressing 32000 x 4096 takes 2.8 GB, 4096 x 11008 takes 2.6 GB, calibrating a block of a 7B model
2.4 GB, the predictions of 2048 tokens for a vocabulary of 128256 2.4 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..calibration.statistics import DRAWN
from ..linalg.second_moments import SecondMoment
from .scale_tuning import TOKENS_PER_STEP

_PROCESS = 600_000_000
_PER_WEIGHT = 12  # the delta, its image in the metric, and factors, float32
_PER_METRIC = 11  # a full metric, its factor, half of it in float64, and what is made of it
_PER_ACTIVATION = 4  # of a matrix's inputs and outputs, for the backward pass
_PER_DRAWN = 16  # of the predictions' noise that is drawn at once
_PREDICTIONS = 1_000_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {self.memory / 1e9:.1f} GB of memory and {self.disk / 1e9:.1f} GB of disk"


@dataclass(frozen=True)
class Block:
    """Bytes of a block of the model, and [m, n] of its targets."""

    nbytes: int
    shapes: list[tuple[int, int]]

    def learning(self, tokens: int) -> int:
        """Bytes of what a backward pass over so many tokens needs."""
        return _PER_ACTIVATION * tokens * sum(m + n for m, n in self.shapes)

    def moments(self) -> int:
        """Bytes of the statistics of its targets."""
        return sum(SecondMoment(side).nbytes for shape in self.shapes for side in shape)


def estimate_memory(
    shapes: Mapping[str, tuple[int, int]],
    blocks: list[Block],
    batches: list[int],
    logits: tuple[int, int],
    itemsize: int,
    chained: bool,
    result: int,
) -> MemoryEstimate:
    """What compressing matrices of these [m, n] takes.

    Args:
        blocks: those that are called in turn.
        batches: tokens of each calibration batch.
        logits: the vocabulary and the size of the hidden states.
        itemsize: bytes of an element of hidden states and logits.
        chained: blocks are fitted one after the other, with exact input metrics.
        result: bytes of the delta.
    """
    memory = disk = 0
    for m, n in shapes.values():
        job = _PER_WEIGHT * m * n
        for side, exact in ((m, False), (n, chained)):
            kept = SecondMoment(side)
            full = kept.kind == "full" or (exact and n < m * 4)
            if batches:
                job += _PER_METRIC * side * side if full else 2 * kept.nbytes
                disk += kept.nbytes
        memory = max(memory, job)
    if batches:
        (classes, hidden), most = logits, max(batches)
        predicting = itemsize * classes * (2 * most + hidden)
        predicting += _PER_DRAWN * min(classes * most, DRAWN)
        widest = max((n for m, n in shapes.values() if n < m * 4), default=0)
        summing = 8 * widest * widest
        passing = [(2 if chained else 1) * block.nbytes + summing for block in blocks]
        learning = [block.nbytes + block.moments() + block.learning(most) for block in blocks]
        steps = sum(block.learning(TOKENS_PER_STEP) for block in blocks)
        memory = max(memory, predicting, steps, *passing, *learning)
        states = sum(batches) * hidden * itemsize
        largest = max((block.nbytes for block in blocks), default=0)
        disk += states * (len(blocks) + 4) + 12 * states + largest + _PREDICTIONS
    return MemoryEstimate(_PROCESS + memory, disk + 2 * result)
