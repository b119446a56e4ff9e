"""One model being compressed: measure the fine-tune, compress every matrix, tune the scales.

Order matters. Everything that is measured on the fine-tune (statistics, predictions to tune by,
hidden states that enter the blocks) is measured before the first weight changes. Matrices outside
the blocks come first, because the blocks are fitted to what they hand on; then the blocks in order;
the scales of all of them last. What an interrupted run has left in the store is not done again.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.block_chain import BlockChain
from ..calibration.statistics import LayerStatistics, Metrics, metrics_of
from ..checkpoint.base import BaseCheckpoint
from ..config import DeltaMixConfig
from ..jobs.instruments import Stopwatch, trim_heap
from ..jobs.weight_access import Weights
from ..linalg.second_moments import diagonal
from ..nn.delta_module import oriented
from ..nn.experts import Expert
from ..nn.layers import attach_with_ties, shape_of, tied_modules
from . import scale_tuning
from .matrix_pipeline import Compressed, Compressor
from .runs import LoadedRuns
from .sequential import compress_blocks

_ROWS = 4096  # of a delta at once


class Job:
    """Compression of one model; fills the config with records."""

    def __init__(self, runs: LoadedRuns, config: DeltaMixConfig):
        self.runs, self.config, self.targets = runs, config, runs.targets
        self.model, self.weights, self.base = runs.model, runs.weights, runs.weights.base
        self.workers, self.store = runs.workers, runs.store
        # as the first worker sees it: all must leave out the same
        finished = {n for n in self.targets if self.store.read(f"matrix {n}") is not None}
        self.finished: set[str] = self.workers.from_first(finished)
        self.batches: list[Tensor] = []
        self.tuning_data = scale_tuning.TuningData([], [], [])
        self.found: Mapping[str, LayerStatistics] = {}
        self.scored = 1
        self.watch = Stopwatch()
        self._results: dict[str, Compressed] = {}

    # What is measured on the fine-tune

    def measure(self, batches: list[Tensor]) -> None:
        """Measure statistics and predictions of the fine-tune, if there are any batches.

        Batches are token ids int64 [rows, length]. Raises DeltaMixError if the model gives NaN.
        """
        self.batches = batches
        if not batches:
            return
        seed, fisher = self.config.seed, self.config.method.fisher
        tuned = self.config.method.tune_steps
        if len(self.finished) < len(self.targets) or (tuned and not self.runs.predicted(batches)):
            observed = {n: m for name in self.targets for n, m in self._users(name).items()}
            if not fisher:  # a tied embedding is measured where it is a matrix
                observed = {n: m for n, m in observed.items() if not isinstance(m, nn.Embedding)}
            with self.watch.stage("statistics"):
                self.found, self.scored = self.runs.statistics(observed, batches, fisher, seed)
        if tuned:
            with self.watch.stage("predictions"):
                self.tuning_data = self.runs.predictions(batches, seed)
        self.runs.forget()

    def _users(self, name: str) -> dict[str, nn.Module]:
        """The modules that use a target's weight, by name."""
        target = self.targets[name]
        return {name: target} if isinstance(target, Expert) else tied_modules(self.model, name)

    def _uses(self, name: str) -> list[LayerStatistics]:
        return [self.found[n] for n in self._users(name) if n in self.found]

    def metrics(self, name: str, inputs: Tensor | None = None) -> Metrics:
        """Look up the metrics of a target; what was never called gets the mean weight of the rest.

        `inputs` is its C [n, n], if that was measured anew.
        """
        if uses := self._uses(name):
            return metrics_of(uses, self.scored, inputs, self.config.method.prior)
        if not (self.found and self.config.method.fisher):
            return Metrics()
        sides = zip(shape_of(self.targets[name]), self._typical, strict=True)
        return Metrics(*(torch.full((d,), x, device=self.weights.device) for d, x in sides))

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

    # Weights

    def measured(self, name: str, inputs: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Read ΔW float32 [m, n] of a target, and its `metrics`."""
        return self.delta(name), self.metrics(name, inputs)

    def delta(self, name: str) -> Tensor:
        """Read ΔW float32 [m, n] of a target."""
        with self.watch.stage("read"):
            delta, base = self._copied(name, self.weights), self._matrix(name, self.base)
            for rows, other in zip(delta.split(_ROWS), base.split(_ROWS), strict=True):
                rows -= other.to(rows.device, torch.float32)
        return delta

    def _copied(self, name: str, source: Weights | BaseCheckpoint) -> Tensor:
        """A copy of a target's matrix, float32 [m, n]."""
        return self._matrix(name, source).to(self.weights.device, torch.float32, copy=True)

    def _matrix(self, name: str, source: Weights | BaseCheckpoint) -> Tensor:
        target = self.targets[name]
        if isinstance(target, Expert):
            return oriented(target, source.read_expert(target.fused.name, target.number))
        return oriented(target, source.read(f"{name}.weight"))

    # Compression

    def run(self, budget: int) -> None:
        """Compress all targets into `budget` bytes, then tune.

        Raises DeltaMixError if a delta holds NaN, or a metric cannot be factorised.
        """
        shapes = {name: shape_of(module) for name, module in self.targets.items()}
        embeddings = {name for name, m in self.targets.items() if isinstance(m, nn.Embedding)}
        tools = self.store, self.watch, self.workers
        with self.watch.stage("allocation"):
            self._compressor = Compressor(
                shapes, embeddings, self.measured, budget, self.config, *tools
            )
        chains = self._chains()
        blocks = tuple(f"{block}." for chain in chains for block in chain.names)
        chained = [name for name in self.targets if name.startswith(blocks)]
        self._bar = logging.tqdm(total=len(self.targets), desc="Compressing", unit="matrix")
        with self.watch.stage("compression"):
            plain = [name for name in self.targets if name not in chained]
            plain.sort(key=lambda name: -sum(shapes[name]))
            for name in self._compress_all(dict.fromkeys(plain)):
                self._attach(name)
            for chain in chains:
                finished = frozenset(self.finished)  # before this chain, as all workers see it
                fit, attach, prior = self._fit, self._attach_block, self.config.method.prior
                compress_blocks(chain, chained, fit, attach, finished, self.workers, prior)
        self._bar.close()
        self.workers.barrier()  # after it nobody reads the store
        if self.tuning_data and self.workers.rank == 0:
            steps, anew = self.config.method.tune_steps, self.runs.unpack_anew
            with self.watch.stage("tuning"), self.runs.tuning():
                scale_tuning.tune(self.model, self.tuning_data, steps, self.store, anew)
                self.config.measured = scale_tuning.validation_kl(self.model, self.tuning_data)

    def _chains(self) -> list[BlockChain]:
        """The chains of blocks to fit one after the other, if there is anything to do."""
        unfinished = len(self.finished) < len(self.targets)
        if not (self.config.method.sequential and self.batches and unfinished):
            return []
        with self.watch.stage("sequential"):
            return self.runs.chains(self.batches)  # what is stored whole is rounded by now

    def _fit(self, changes: dict[str, Tensor | None], inputs: Tensor | None) -> dict[str, Tensor]:
        """Compress the targets of a stage; their compressed weights [m, n]."""
        weights = {}
        for name in self._compress_all(changes, inputs):
            packed, weight = self._results[name].packed, self._copied(name, self.base)
            weights[name] = weight if packed is None else weight.add_(packed.dense())
        return weights

    def _compress_all(
        self, changes: dict[str, Tensor | None], inputs: Tensor | None = None
    ) -> Iterator[str]:
        """Names of targets in turn as they are compressed, by this worker or by others."""
        owners = self.workers.owners({name: shape_of(self.targets[name]) for name in changes})
        for name in sorted(changes, key=lambda name: owners[name] != self.workers.rank):
            if owners[name] != self.workers.rank:
                with self.watch.stage("waiting"):
                    self.workers.wait(self.store, f"matrix {name}")
                self.finished.add(name)
            self._compress(name, changes.pop(name), inputs)
            yield name

    def _compress(self, name: str, change: Tensor | None, inputs: Tensor | None) -> None:
        result = self._compressor.recall(name) if name in self.finished else None
        if result is None:
            delta, metrics = self.measured(name, inputs)
            if change is not None:
                delta += change
                del change
            result = self._compressor.compress(name, delta, metrics)
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
        result, target = self._results.pop(name), self.targets[name]
        packed = result.packed and self.runs.placed(result.packed, f"matrix {name}")
        if packed is None:
            self.config.dropped.append(name)
        else:
            self.config.errors[name] = result.error
        if isinstance(target, Expert):
            self.weights.put_base(target.fused.name, target.number)
            target.fused.finish(target.number, packed)
        else:
            self.weights.put_base(f"{name}.weight")
            if packed is not None:
                attach_with_ties(self.model, name, packed)
