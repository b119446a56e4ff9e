"""`Job` for a model whose weights stay in their files: one block in memory, the rest on disk.

Statistics, hidden states and the fine-tune's predictions are kept in the journal, where an
interrupted job finds them again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from ..calibration.block_chain import BlockChain, find_blocks
from ..calibration.blockwise import BlockwisePass, after_blocks
from ..calibration.data import split_rows
from ..errors import DeltaMixError
from ..jobs.resume_store import TensorList
from ..jobs.weight_access import LazyWeights
from ..nn.layers import shape_of
from . import scale_tuning
from .job import Job
from .memory_estimate import Block, MemoryEstimate, estimate_memory


class LazyJob(Job):
    """One model being compressed; its journal has a folder."""

    weights: LazyWeights

    @cached_property
    def chain(self) -> BlockChain:
        """The chain of blocks as the statistics know it."""
        return self._captured()

    def _captured(self) -> BlockChain:
        """The chain of blocks with the weights as they are now.

        Raises:
            DeltaMixError: the model is no such chain.
        """
        blocks = find_blocks(self.model, list(self.targets))
        tensor_list = partial(
            TensorList, self.store.of(self.workers.rank), device=self.weights.device
        )
        if len(blocks) == 1:
            chain = BlockChain(self.model, blocks[0], self.batches, self.weights.hold, tensor_list)
            if chain.capture() and chain.plain:
                return chain
        raise DeltaMixError(
            f"a {type(self.model).__name__} is no single chain of blocks, so it cannot be run "
            "block by block; compress it in memory, or without text by method='deltamix'"
        )

    def estimate_memory(self, batches: list[Tensor], result: int) -> MemoryEstimate:
        """What this job takes for a delta of `result` bytes."""
        shapes = {name: shape_of(module) for name, module in self.targets.items()}
        blocks = [
            Block(
                self.weights.nbytes(block),
                [shape for name, shape in shapes.items() if name.startswith(f"{block}.")],
            )
            for names in find_blocks(self.model, list(self.targets))
            for block in names
        ]
        config: Any = self.model.config.get_text_config()
        return estimate_memory(
            shapes,
            blocks,
            [ids.numel() for ids in batches],
            (getattr(config, "vocab_size", 0), config.hidden_size),
            self.model.dtype.itemsize,
            self.config.method.sequential,
            result,
        )

    def measure(self, batches: list[Tensor]) -> None:
        super().measure(batches)
        if batches and self.workers.rank == 0:  # nobody is in the passes any more
            for i in range(len(self.chain.blocks)):
                self._passes.forget("level", i + 1, range(len(batches)))

    def _collect_statistics(self, batches: list[Tensor]) -> None:
        self.found, self.scored = self._passes.found, self._passes.scored

    @cached_property
    def _passes(self) -> BlockwisePass:
        config, device = self.config, self.weights.device
        modules = self.observed()
        return BlockwisePass(
            self.chain, modules, config.method.fisher, config.seed, self.store, device, self.workers
        )

    def _record_targets(self, batches: list[Tensor]) -> None:
        if self.workers.rank:  # the first tunes
            return
        places: list[tuple[int, int]] = []  # of each piece: its batch and first row
        for b, ids in enumerate(batches):
            pieces = split_rows(ids, scale_tuning.TOKENS_PER_STEP)
            places += [(b, i * len(pieces[0])) for i in range(len(pieces))]
        last = len(self.chain.blocks)

        def output(i: int, ids: Tensor) -> Any:
            b, start = places[i]
            hidden = self._passes.get("level", last, b)[start : start + len(ids)]
            return after_blocks(self.chain, ids, hidden)

        tensor_list, seed = partial(TensorList, self.store), self.config.seed
        self.course = scale_tuning.tuning_batches(self.model, batches, seed, tensor_list, output)

    def _attach(self, name: str) -> None:
        result = self._results[name]
        found = self.store.read(f"matrix {name}", mapped=True)
        if result.packed is not None and found and self.weights.device.type == "cpu":
            # where it lies on disk: the deltas of all matrices are a 16th of the model
            tensors: Any = found[0]
            self._results[name] = replace(result, packed=replace(result.packed, **tensors))
        super()._attach(name)

    def _stacks(self) -> list[BlockChain]:
        return [self._captured()]  # what is stored whole has been rounded since

    def _tune(self, small: bool = True) -> None:
        with self.weights.forgotten():
            super()._tune(small)
