"""Where a job's weights, and runs of the fine-tune, come from: a loaded model, or its files.

From files one block is in memory at a time. Statistics, hidden states and predictions are in the
resume store, where an interrupted job finds them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.block_chain import BlockChain, find_blocks
from ..calibration.blockwise import BlockwisePass
from ..calibration.statistics import LayerStatistics, collect
from ..checkpoint.base import BaseCheckpoint
from ..errors import DeltaMixError
from ..jobs.resume_store import ResumeStore, TensorList
from ..jobs.weight_access import LazyWeights, LoadedWeights, Weights
from ..jobs.workers import ALONE, Workers
from ..quantization.packed_delta import PackedDelta
from .scale_tuning import TuningData, tuning_batches, tuning_pieces

Statistics = tuple[Mapping[str, LayerStatistics], int]
Targets = dict[str, nn.Module]
"""Layers and experts to compress, by name."""


@dataclass(frozen=True)
class Source:
    """A fine-tune to compress: a model in memory, or its files."""

    model: PreTrainedModel  # loaded; if `files` are given, as `weight_access.unloaded` makes it
    commit: str | None = None  # of its repo, for its tokenizer; None for a local folder
    files: BaseCheckpoint | None = None  # where its weights are, if not in the model
    device: torch.device | str = "cpu"  # where a model from files runs
    workers: Workers = ALONE  # who compress a model from files together

    def runs(
        self, base: BaseCheckpoint, overlay: dict[str, Tensor], targets: Targets, store: ResumeStore
    ) -> LoadedRuns:
        """Give access to weights and runs; `overlay` is what is stored whole."""
        if self.files is None:
            return LoadedRuns(LoadedWeights(self.model, base), targets, store)
        device = torch.device(self.device)
        weights = LazyWeights(self.model, self.files, base, device, overlay)
        return FileRuns(weights, targets, store, self.workers)


class LoadedRuns:
    """Weights and runs of a model in memory."""

    unpack_anew = False  # factors, whenever a module runs while its scales are tuned

    def __init__(
        self, weights: Weights, targets: Targets, store: ResumeStore, workers: Workers = ALONE
    ):
        self.model, self.weights = weights.model, weights
        self.targets, self.store, self.workers = targets, store, workers

    def statistics(
        self, modules: Mapping[str, nn.Module], batches: Sequence[Tensor], fisher: bool, seed: int
    ) -> Statistics:
        """Measure modules, as `statistics.collect` does."""
        return collect(self.model, modules, batches, fisher, seed)

    def predictions(self, batches: Sequence[Tensor], seed: int) -> TuningData:
        """Record what scales are tuned by."""
        return tuning_batches(self.model, batches, seed)

    def predicted(self, batches: Sequence[Tensor]) -> bool:
        """Tell whether `predictions` needs nothing of what `statistics` leaves."""
        return True

    def forget(self) -> None:
        """Drop what only `statistics` and `predictions` need."""

    def chains(self, batches: Sequence[Tensor]) -> list[BlockChain]:
        """Capture every chain of blocks that holds targets, with the weights as they are now."""
        blocks = find_blocks(self.model, self.targets)
        chains = [BlockChain(self.model, names, batches) for names in blocks]
        return [chain for chain in chains if chain.capture()]

    def placed(self, packed: PackedDelta, part: str) -> PackedDelta:
        """Choose where packed tensors, a part of the resume store, lie from now on."""
        return packed

    def tuning(self) -> AbstractContextManager[None]:
        """Context manager: allow backward passes."""
        return nullcontext()


class FileRuns(LoadedRuns):
    """Weights and runs of a model in its files."""

    weights: LazyWeights
    unpack_anew = True  # all of them take half as much memory as the model
    _passes: BlockwisePass | None = None

    def statistics(
        self, modules: Mapping[str, nn.Module], batches: Sequence[Tensor], fisher: bool, seed: int
    ) -> Statistics:
        (chain,) = self.chains(batches)
        self._passes = BlockwisePass(chain, modules, fisher, seed, self.store, self.workers)
        return self._passes.found, self._passes.scored

    def predictions(self, batches: Sequence[Tensor], seed: int) -> TuningData:
        if self.workers.rank:  # the first tunes
            return TuningData([], [], [])

        def outputs() -> Iterator[Any]:
            assert self._passes is not None  # statistics are measured in the same run
            chain = self._passes.chain
            self._passes.forward(range(len(batches)))  # an interrupted run may have dropped levels
            for b, ids in enumerate(batches):
                last = self._passes.get("level", len(chain.blocks), b)
                pieces = (tuning_pieces(self.model, t) for t in (ids, last))
                yield from map(chain.after_blocks, *pieces)

        tensor_list = partial(TensorList, self.store)
        return tuning_batches(self.model, batches, seed, tensor_list, outputs())

    def predicted(self, batches: Sequence[Tensor]) -> bool:
        pieces = sum(len(tuning_pieces(self.model, ids)) for ids in batches)
        return len(TensorList(self.store, "wanted")) == pieces

    def forget(self) -> None:
        if self._passes is not None and self.workers.rank == 0:  # nobody is in the passes any more
            self._passes.forget()

    def chains(self, batches: Sequence[Tensor]) -> list[BlockChain]:
        """Capture the chain of blocks; DeltaMixError if the model is no single one."""
        blocks = find_blocks(self.model, self.targets)
        own, device = self.store.of(self.workers.rank), self.weights.device
        tensor_list = partial(TensorList, own, device=device)
        if len(blocks) == 1:
            chain = BlockChain(self.model, blocks[0], batches, self.weights.hold, tensor_list)
            if chain.capture() and chain.plain:
                return [chain]
        raise DeltaMixError(
            f"a {type(self.model).__name__} is no single chain of blocks, so it cannot be run "
            "block by block; compress it in memory, or without text by method='deltamix'"
        )

    def placed(self, packed: PackedDelta, part: str) -> PackedDelta:
        found = self.store.read(part, mapped=True)
        if found is None or self.weights.device.type != "cpu":
            return packed
        tensors: Any = found[0]  # on disk: the deltas of all matrices are a 16th of the model
        return replace(packed, **tensors)

    def tuning(self) -> AbstractContextManager[None]:
        return self.weights.forgotten()
