"""How much memory and disk a compression takes that has one block in memory at a time.

Fitted to peaks of the process on one CPU (docs/results), of which the process itself is 0.6 GB:
compressing 32000 x 4096 takes 2.8 GB, 4096 x 11008 takes 2.6 GB, calibrating a block of a 7B model
2.4 GB, the predictions of 2048 tokens for a vocabulary of 128256 2.4 GB.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.block_chain import find_blocks
from ..calibration.statistics import DRAWN
from ..linalg.second_moments import SecondMoment
from ..nn.layers import shape_of
from .scale_tuning import TOKENS_PER_STEP

_PROCESS = 700_000_000  # and what does not grow with the model
_PER_WEIGHT = 12  # the delta, its image in the metric, and factors, float32
_PER_METRIC = 11  # a full metric, its factor, half of it in float64, and what is made of it
_PER_ACTIVATION = 4  # of a matrix's inputs and outputs, for the backward pass
_PER_DRAWN = 16  # of the predictions' noise that is drawn at once
_PREDICTIONS = 1_000_000_000


def estimate_memory(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    sequential: bool,
    result: int,
) -> tuple[int, int]:
    """Estimate the peaks of compressing `targets`, by name, of a model from its files.

    Returns bytes of memory and of disk. Batches are token ids [rows, length], `result` the delta's
    bytes. If `sequential`, blocks are fitted one after the other, with exact input metrics.
    """
    shapes = {name: shape_of(module) for name, module in targets.items()}
    peaks = [_compressing(shape, bool(batches), sequential) for shape in shapes.values()]
    if not batches:
        return _PROCESS + max(peaks, default=0), 2 * result
    config: Any = model.config.get_text_config()
    classes, hidden = getattr(config, "vocab_size", 0), config.hidden_size
    itemsize, most = model.dtype.itemsize, max(ids.numel() for ids in batches)
    peaks.append(itemsize * classes * (2 * most + hidden) + _PER_DRAWN * min(classes * most, DRAWN))
    widest = max((n for m, n in shapes.values() if _is_exact(m, n)), default=0)
    blocks = [name for names in find_blocks(model, targets) for name in names]
    steps = largest = 0
    for block in blocks:
        nbytes = sum(p.nbytes for p in model.get_submodule(block).parameters())
        inside = [shape for name, shape in shapes.items() if name.startswith(f"{block}.")]
        activations = _PER_ACTIVATION * sum(m + n for m, n in inside)
        moments = sum(SecondMoment(side).nbytes for shape in inside for side in shape)
        peaks.append((1 + sequential) * nbytes + 8 * widest * widest)  # run, and sums of a stage
        peaks.append(nbytes + moments + activations * most)  # calibration
        steps += activations * TOKENS_PER_STEP
        largest = max(largest, nbytes)
    states = sum(ids.numel() for ids in batches) * hidden * itemsize
    disk = sum(SecondMoment(side).nbytes for shape in shapes.values() for side in shape)
    disk += states * (len(blocks) + 4) + 12 * states + largest + _PREDICTIONS
    return _PROCESS + max(*peaks, steps), disk + 2 * result


def _is_exact(m: int, n: int) -> bool:
    """Whether the sequential correction keeps the input metric [n, n] of an [m, n] matrix."""
    return n < m * 4


def _compressing(shape: tuple[int, int], measured: bool, sequential: bool) -> int:
    """Bytes for one matrix [m, n]."""
    m, n = shape
    nbytes = _PER_WEIGHT * m * n
    for side, exact in ((m, False), (n, sequential and _is_exact(m, n))):
        moment = SecondMoment(side)
        if measured and (exact or moment.kind == "full"):
            nbytes += _PER_METRIC * side * side
        elif measured:
            nbytes += 2 * moment.nbytes
    return nbytes
