"""One model being compressed: measure the fine-tune, compress every matrix, tune the scales.

Order matters. Everything that is measured on the fine-tune (statistics, predictions to tune by,
hidden states that enter the blocks) is measured before the first weight changes. Matrices outside
the blocks come first, because the blocks are fitted to what they hand on; then the blocks in order;
the scales of all of them last. What an interrupted run has left in the journal is not done again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration.block_chain import BlockChain, find_blocks
from ..calibration.statistics import LayerStatistics, Metrics, collect, metrics_of
from ..checkpoint.base import BaseCheckpoint
from ..config import DeltaMixConfig
from ..jobs.instruments import Stopwatch, trim_heap
from ..jobs.resume_store import ResumeStore
from ..jobs.weight_access import Weights
from ..jobs.workers import Workers, cost
from ..linalg.second_moments import diagonal
from ..nn.experts import Expert
from ..nn.layers import attach_with_ties, oriented, shape_of, tied_modules
from . import scale_tuning
from .budget import Budget
from .matrix_pipeline import Compressed, Compressor, Matrix
from .sequential import compress_blocks

logger = logging.get_logger(__name__)

_ROWS = 4096  # of a delta at once


class Job:
    """One model being compressed: what was measured of it, and what is done."""

    def __init__(
        self,
        model: PreTrainedModel,
        base: BaseCheckpoint,
        config: DeltaMixConfig,
        targets: dict[str, nn.Module],
        store: ResumeStore,
        weights: Weights,
        workers: Workers | None = None,
    ):
        self.workers = workers or Workers()
        self.model, self.base, self.config, self.targets = model, base, config, targets
        self.store, self.weights = store, weights
        self.finished = self._finished_before()
        self.batches: list[Tensor] = []
        self.course: Sequence[scale_tuning.TuningBatch] = []
        self.found: Mapping[str, LayerStatistics] = {}
        self.scored = 1
        self.watch = Stopwatch()
        self._results: dict[str, Compressed] = {}

    def _finished_before(self) -> set[str]:
        """Targets an earlier run has finished, as the first worker sees it: all do the same."""
        found = {n for n in self.targets if self.store.read(f"matrix {n}") is not None}
        return self.workers.from_first(found)

    def measure(self, batches: list[Tensor]) -> None:
        """Statistics and predictions of the fine-tune."""
        self.batches = batches
        if not batches:
            return
        if len(self.finished) < len(self.targets):
            with self.watch.stage("statistics"):
                self._collect_statistics(batches)
        if self.config.method.tune_steps:
            with self.watch.stage("predictions"):
                self._record_targets(batches)

    def _collect_statistics(self, batches: list[Tensor]) -> None:
        """Fill in `found` and `scored`."""
        fisher, seed = self.config.method.fisher, self.config.seed
        self.found, self.scored = collect(self.model, self.observed(), batches, fisher, seed)

    def _record_targets(self, batches: list[Tensor]) -> None:
        """Fill in `course`."""
        self.course = scale_tuning.tuning_batches(self.model, batches, self.config.seed)

    def observed(self) -> dict[str, nn.Module]:
        """The modules whose statistics make up those of the targets."""
        observed: dict[str, nn.Module] = {}
        for name in self.targets:
            users = self._users(name)
            # a tied embedding is measured where it is used as a matrix
            if not self.config.method.fisher:
                users = {n: m for n, m in users.items() if not isinstance(m, nn.Embedding)}
            observed |= users
        return observed

    def _uses(self, name: str) -> list[LayerStatistics]:
        return [self.found[n] for n in self._users(name) if n in self.found]

    def metrics(self, name: str, inputs: Tensor | None = None) -> Metrics:
        """Metrics of a target; what was never called gets the mean weight of what was.

        `inputs` is its C [n, n], if that was measured anew.
        """
        if uses := self._uses(name):
            return metrics_of(uses, self.scored, inputs)
        if not (self.found and self.config.method.fisher):
            return Metrics()
        m, n = shape_of(self.targets[name])
        return Metrics(
            torch.full((m,), self._typical[0], device=self.weights.device),
            torch.full((n,), self._typical[1], device=self.weights.device),
        )

    @cached_property
    def _typical(self) -> tuple[float, float]:
        """Medians over the targets of the mean weight of an output and of an input."""
        sides: tuple[list[float], list[float]] = ([], [])
        for name in self.targets:
            if uses := self._uses(name):
                found = metrics_of(uses, self.scored)
                for side, metric in zip(sides, (found.outputs, found.inputs), strict=True):
                    if (x := diagonal(metric)) is not None:
                        side.append(float(x.mean()))
        return statistics.median(sides[0] or [1.0]), statistics.median(sides[1] or [1.0])

    def _users(self, name: str) -> dict[str, nn.Module]:
        """The modules that use a target's weight, by name."""
        target = self.targets[name]
        return {name: target} if isinstance(target, Expert) else tied_modules(self.model, name)

    def delta(self, name: str) -> Tensor:
        """ΔW float32 [m, n] of a target."""
        with self.watch.stage("read"):
            delta = self._matrix(name, self.weights)
            base = oriented(self.targets[name], self._read(name, self.base))
            for rows, other in zip(delta.split(_ROWS), base.split(_ROWS), strict=True):
                rows -= other.to(rows.device, torch.float32)
        return delta

    def _matrix(self, name: str, source: Weights | BaseCheckpoint) -> Tensor:
        """A copy of a target's matrix, float32 [m, n]."""
        weight = oriented(self.targets[name], self._read(name, source))
        return weight.to(self.weights.device, torch.float32, copy=True)

    def _read(self, name: str, source: Weights | BaseCheckpoint) -> Tensor:
        target = self.targets[name]
        if isinstance(target, Expert):
            return source.read_expert(target.fused.name, target.number)
        return source.read(f"{name}.weight")

    def run(self, budget: Budget) -> None:
        """Compress every target, then tune."""
        config = self.config
        matrices = {
            name: Matrix(
                shape_of(module),
                partial(self.delta, name),
                partial(self.metrics, name),
                isinstance(module, nn.Embedding),
            )
            for name, module in self.targets.items()
        }
        with self.watch.stage("allocation"):
            compressor = Compressor(matrices, budget, config, self.store, self.watch, self.workers)
        stacks: list[BlockChain] = []
        if config.method.sequential and self.batches and len(self.finished) < len(self.targets):
            with self.watch.stage("sequential"):
                stacks = self._stacks()
        blocks = tuple(f"{block}." for chain in stacks for block in chain.names)
        chained = [name for name in self.targets if blocks and name.startswith(blocks)]
        plain = [name for name in self.targets if name not in chained]
        self._bar = logging.tqdm(total=len(matrices), desc="Compressing", unit="matrix")
        with self.watch.stage("compression"):
            plain = sorted(plain, key=lambda name: -sum(matrices[name].shape))
            for name in self._compress_all(compressor, dict.fromkeys(plain)):
                self._attach(name)
            for chain in stacks:
                finish = partial(self._fit, compressor)
                compress_blocks(
                    chain,
                    chained,
                    finish,
                    self._attach_block,
                    frozenset(self.finished),
                    self.workers,
                    partial(self._owners, compressor),
                )
        self._bar.close()
        self.workers.barrier()  # nobody reads the store any more
        if self.course and self.workers.rank == 0:
            with self.watch.stage("tuning"):
                self._tune()

    def _stacks(self) -> list[BlockChain]:
        """The chains of blocks, captured."""
        blocks = find_blocks(self.model, list(self.targets))
        stacks = [BlockChain(self.model, names, self.batches) for names in blocks]
        return [chain for chain in stacks if chain.capture()]

    def _tune(self, small: bool = False) -> None:
        scale_tuning.tune(self.model, self.course, self.config.method.tune_steps, self.store, small)
        self.config.measured = scale_tuning.validation_kl(self.model, self.course)

    def _fit(
        self, compressor: Compressor, changes: dict[str, Tensor | None], inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Compress the targets of a stage; their compressed weights [m, n]."""
        weights = {}
        for name in self._compress_all(compressor, changes, inputs):
            packed, weight = self._results[name].packed, self._matrix(name, self.base)
            weights[name] = weight if packed is None else weight.add_(packed.dense())
        return weights

    def _owners(self, compressor: Compressor, names: Iterable[str]) -> dict[str, int]:
        """The worker of each of `names`, if they are compressed together."""
        return self.workers.owners({name: cost(*compressor.shapes[name]) for name in names})

    def _compress_all(
        self,
        compressor: Compressor,
        changes: dict[str, Tensor | None],
        inputs: Tensor | None = None,
    ) -> Iterator[str]:
        """Names of targets in turn as they are compressed, by this worker or by others."""
        owners = self._owners(compressor, changes)
        own = [name for name in changes if owners[name] == self.workers.rank]
        others = [name for name in changes if name not in own]
        for name in own:
            self._compress(compressor, name, changes.pop(name), inputs)
            yield name
        for name in others:
            changes.pop(name)
            with self.watch.stage("waiting"):
                self.workers.wait(self.store, f"matrix {name}")
            self.finished.add(name)
            self._compress(compressor, name, None, None)
            yield name

    def _compress(
        self, compressor: Compressor, name: str, change: Tensor | None, inputs: Tensor | None
    ) -> None:
        result = compressor.recall(name) if name in self.finished else None
        if result is None:
            metrics, delta = self.metrics(name, inputs), self.delta(name)
            if change is not None:
                delta += change
                del change
            result = compressor.compress(name, delta, metrics)
        elif result.packed is not None:
            result = replace(result, packed=result.packed.to(self.weights.device))
        self._results[name] = result
        self._bar.update()
        trim_heap()

    def _attach_block(self, block: str) -> None:
        for name in [name for name in self._results if name.startswith(f"{block}.")]:
            self._attach(name)

    def _attach(self, name: str) -> None:
        """Put the base weight and the packed delta where the fine-tuned weight was."""
        packed, error = self._results[name].packed, self._results[name].error
        target = self.targets[name]
        if isinstance(target, Expert):
            self.weights.put_base(target.fused.name, target.number)
        else:
            self.weights.put_base(f"{name}.weight")
        if packed is None:
            self.config.dropped.append(name)
        else:
            self.config.errors[name] = error
        if isinstance(target, Expert):
            target.fused.finish(target.number, packed)
        elif packed is not None:
            attach_with_ties(self.model, name, packed)
        del self._results[name]
