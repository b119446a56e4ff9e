"""One model being compressed: measure the fine-tune, compress every matrix, tune the scales.

Order matters. Everything that is measured on the fine-tune (statistics, predictions to tune by,
hidden states that enter the blocks) is measured before the first weight changes. Matrices outside
the blocks come first, because the blocks are fitted to what they hand on; then the blocks in order;
the scales of all of them last. What an interrupted run has left in the store is not done again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.block_chain import BlockChain
from ..calibration.statistics import LayerStatistics, Metrics, metrics_of
from ..checkpoint.base import BaseCheckpoint
from ..config import DeltaMixConfig
from ..jobs.instruments import Stopwatch, trim_heap
from ..jobs.resume_store import ResumeStore
from ..jobs.weight_access import Weights
from ..jobs.workers import cost
from ..linalg.second_moments import diagonal
from ..nn.delta_module import oriented
from ..nn.experts import Expert
from ..nn.layers import attach_with_ties, shape_of, tied_modules
from . import scale_tuning
from .budget import Budget
from .matrix_pipeline import Compressed, Compressor, Matrix
from .runs import Runs
from .sequential import compress_blocks

_ROWS = 4096  # of a delta at once


class Job:
    """Compression of one model.

    Args:
        runs: its weights, and where they run.
        base: what it was fine-tuned from.
        config: filled with records.
        targets: layers and experts to compress, by name.
        store: of finished parts.
    """

    def __init__(
        self,
        runs: Runs,
        base: BaseCheckpoint,
        config: DeltaMixConfig,
        targets: dict[str, nn.Module],
        store: ResumeStore,
    ):
        self.runs, self.base, self.config, self.targets = runs, base, config, targets
        self.model, self.weights, self.workers, self.store = (
            runs.model, runs.weights, runs.workers, store,
        )  # fmt: skip
        # as the first worker sees it: all must leave out the same
        finished = {n for n in targets if store.read(f"matrix {n}") is not None}
        self.finished = self.workers.from_first(finished)
        self.batches: list[Tensor] = []
        self.tuning_data: scale_tuning.TuningRows = []
        self.found: Mapping[str, LayerStatistics] = {}
        self.scored = 1
        self.watch = Stopwatch()
        self._results: dict[str, Compressed] = {}

    # What is measured on the fine-tune

    def measure(self, batches: list[Tensor]) -> None:
        """Measure statistics and predictions of the fine-tune.

        Args:
            batches: token ids int64 [rows, length]; nothing is measured without any.

        Raises:
            DeltaMixError: the model gives NaN.
        """
        self.batches = batches
        if not batches:
            return
        seed = self.config.seed
        if len(self.finished) < len(self.targets):
            with self.watch.stage("statistics"):
                observed = self._observed()
                self.found, self.scored = self.runs.statistics(
                    observed, batches, self.config.method.fisher, seed
                )
        if self.config.method.tune_steps:
            with self.watch.stage("predictions"):
                self.tuning_data = self.runs.predictions(batches, seed)
        self.runs.forget(len(batches))

    def _observed(self) -> dict[str, nn.Module]:
        """The modules whose statistics make up those of the targets."""
        observed: dict[str, nn.Module] = {}
        for name in self.targets:
            users = self._users(name)
            if not self.config.method.fisher:  # a tied embedding is measured where it is a matrix
                users = {n: m for n, m in users.items() if not isinstance(m, nn.Embedding)}
            observed |= users
        return observed

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
            return metrics_of(uses, self.scored, inputs)
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

    def delta(self, name: str) -> Tensor:
        """Read ΔW float32 [m, n] of a target."""
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

    # Compression

    def run(self, budget: Budget) -> None:
        """Compress every target, then tune.

        Raises:
            DeltaMixError: a delta holds NaN, or a metric cannot be factorised.
        """
        with self.watch.stage("allocation"):
            self._compressor = Compressor(
                self._matrices(), budget, self.config, self.store, self.watch, self.workers
            )
        chains = self._chains()
        blocks = tuple(f"{block}." for chain in chains for block in chain.names)
        chained = [name for name in self.targets if blocks and name.startswith(blocks)]
        self._bar = logging.tqdm(total=len(self.targets), desc="Compressing", unit="matrix")
        with self.watch.stage("compression"):
            plain = [name for name in self.targets if name not in chained]
            plain.sort(key=lambda name: -sum(shape_of(self.targets[name])))
            for name in self._compress_all(dict.fromkeys(plain)):
                self._attach(name)
            for chain in chains:
                compress_blocks(
                    chain,
                    chained,
                    self._fit,
                    self._attach_block,
                    frozenset(self.finished),
                    self.workers,
                    self._owners,
                )
        self._bar.close()
        self.workers.barrier()  # after it nobody reads the store
        if self.tuning_data and self.workers.rank == 0:
            with self.watch.stage("tuning"), self.runs.tuning():
                self._tune()

    def _matrices(self) -> dict[str, Matrix]:
        return {
            name: Matrix(
                shape_of(module),
                partial(self.delta, name),
                partial(self.metrics, name),
                isinstance(module, nn.Embedding),
            )
            for name, module in self.targets.items()
        }

    def _chains(self) -> list[BlockChain]:
        """The chains of blocks to fit one after the other, if there is anything to do."""
        unfinished = len(self.finished) < len(self.targets)
        if not (self.config.method.sequential and self.batches and unfinished):
            return []
        with self.watch.stage("sequential"):
            return self.runs.chains(self.batches)  # what is stored whole is rounded by now

    def _tune(self) -> None:
        steps, anew = self.config.method.tune_steps, self.runs.unpack_anew
        scale_tuning.tune(self.model, self.tuning_data, steps, self.store, anew)
        self.config.measured = scale_tuning.validation_kl(self.model, self.tuning_data)

    def _fit(self, changes: dict[str, Tensor | None], inputs: Tensor | None) -> dict[str, Tensor]:
        """Compress the targets of a stage; their compressed weights [m, n]."""
        weights = {}
        for name in self._compress_all(changes, inputs):
            packed, weight = self._results[name].packed, self._matrix(name, self.base)
            weights[name] = weight if packed is None else weight.add_(packed.dense())
        return weights

    def _owners(self, names: Iterable[str]) -> dict[str, int]:
        """The worker of each of `names`, if they are compressed together."""
        return self.workers.owners({name: cost(*shape_of(self.targets[name])) for name in names})

    def _compress_all(
        self, changes: dict[str, Tensor | None], inputs: Tensor | None = None
    ) -> Iterator[str]:
        """Names of targets in turn as they are compressed, by this worker or by others."""
        owners = self._owners(changes)
        own = [name for name in changes if owners[name] == self.workers.rank]
        others = [name for name in changes if name not in own]
        for name in own:
            self._compress(name, changes.pop(name), inputs)
            yield name
        for name in others:
            changes.pop(name)
            with self.watch.stage("waiting"):
                self.workers.wait(self.store, f"matrix {name}")
            self.finished.add(name)
            self._compress(name, None, None)
            yield name

    def _compress(self, name: str, change: Tensor | None, inputs: Tensor | None) -> None:
        result = self._compressor.recall(name) if name in self.finished else None
        if result is None:
            metrics, delta = self.metrics(name, inputs), self.delta(name)
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
        if isinstance(target, Expert):
            self.weights.put_base(target.fused.name, target.number)
        else:
            self.weights.put_base(f"{name}.weight")
        if packed is None:
            self.config.dropped.append(name)
        else:
            self.config.errors[name] = result.error
        if isinstance(target, Expert):
            target.fused.finish(target.number, packed)
        elif packed is not None:
            attach_with_ties(self.model, name, packed)
