"""One model being compressed: measure the fine-tune, compress every matrix, tune the scales.

Order matters. Everything that is measured on the fine-tune (statistics, predictions to tune by,
hidden states that enter the blocks) is measured before the first weight changes. Matrices outside
the blocks come first, because the blocks are fitted to what they hand on; then the blocks in order;
the scales of all of them last. What an interrupted run has left in the journal is not done again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from . import tuning
from .base import BaseCheckpoint
from .compress import Budget, Compressed, Compressor, Matrix
from .config import DeltaMixConfig
from .experts import Expert
from .journal import Journal
from .modules import attach_with_ties, matrix_of, oriented, shape_of, tied_modules, weight_of
from .sequential import Stack, find_blocks
from .statistics import LayerStatistics, Metrics, collect, metrics_of

logger = logging.get_logger(__name__)


class Job:
    """One model being compressed: what was measured of it, and what is done."""

    def __init__(
        self,
        model: PreTrainedModel,
        base: BaseCheckpoint,
        config: DeltaMixConfig,
        targets: dict[str, nn.Module],
        journal: Journal,
    ):
        self.model, self.base, self.config, self.targets = model, base, config, targets
        self.journal = journal
        self.finished = {name for name in targets if journal.read(f"matrix {name}") is not None}
        self.batches: list[Tensor] = []
        self.course: list[tuning.Lesson] = []
        self.uses: dict[str, list[LayerStatistics]] = {}
        self.scored = 1
        self.seconds: dict[str, float] = {}
        self._results: dict[str, Compressed] = {}

    def measure(self, batches: list[Tensor]) -> None:
        """Statistics and predictions of the fine-tune."""
        config, model = self.config, self.model
        self.batches = batches
        if not batches:
            return
        if len(self.finished) < len(self.targets):
            self._collect(batches)
        if config.tune_steps:
            with self._timed("predictions"):
                self.course = tuning.lessons(model, batches, config.seed)

    def _collect(self, batches: list[Tensor]) -> None:
        config, model = self.config, self.model
        with self._timed("statistics"):
            observed: dict[str, nn.Module] = {}
            for name in self.targets:
                users = self._users(name)
                if not config.fisher:  # a tied embedding is measured where it is used as a matrix
                    users = {n: m for n, m in users.items() if not isinstance(m, nn.Embedding)}
                observed |= users
            found, self.scored = collect(model, observed, batches, config.fisher, config.seed)
            for name in self.targets:
                uses = [found[n] for n in self._users(name) if n in found]
                self.uses |= {name: uses} if uses else {}

    def metrics(self, name: str) -> Metrics:
        """Metrics of a target; what was never called gets the mean weight of what was."""
        if name in self.uses:
            return metrics_of(self.uses[name], self.scored)
        if not (self.uses and self.config.fisher):
            return Metrics()
        m, n = shape_of(self.targets[name])
        device = weight_of(self.targets[name]).device
        return Metrics(
            torch.full((m,), self._typical[0], device=device),
            torch.full((n,), self._typical[1], device=device),
        )

    @cached_property
    def _typical(self) -> tuple[float, float]:
        sides: tuple[list[float], list[float]] = [], []
        for uses in self.uses.values():  # of one at a time: a mixture has thousands
            found = metrics_of(uses, self.scored)
            for side, x in zip(sides, (found.outputs, found.inputs), strict=True):
                if x is not None:
                    side.append(float((x.diagonal() if x.dim() == 2 else x).mean()))
        a, c = (statistics.median(side or [1.0]) for side in sides)
        return a, c

    def _users(self, name: str) -> dict[str, nn.Module]:
        """The modules that use a target's weight, by name."""
        target = self.targets[name]
        return {name: target} if isinstance(target, Expert) else tied_modules(self.model, name)

    def _base_weight(self, name: str) -> Tensor:
        target = self.targets[name]
        if isinstance(target, Expert):
            return self.base.read_expert(target.fused.name, target.number)
        return self.base.read(f"{name}.weight")

    def delta(self, name: str) -> Tensor:
        module = self.targets[name]
        weight = matrix_of(module).detach()
        base = oriented(module, self._base_weight(name))
        return weight.float() - base.to(weight.device, torch.float32)

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
        with self._timed("allocation"):
            compressor = Compressor(matrices, budget, config, self.journal)
        stacks: list[Stack] = []
        if config.sequential and self.batches and len(self.finished) < len(self.targets):
            with self._timed("sequential"):
                found = [
                    Stack(self.model, names, self.batches)
                    for names in find_blocks(self.model, list(self.targets))
                ]
                stacks = [stack for stack in found if stack.capture()]
        blocks = tuple(f"{block}." for stack in stacks for block in stack.names)
        chained = [name for name in self.targets if blocks and name.startswith(blocks)]
        plain = [name for name in self.targets if name not in chained]
        self._bar = logging.tqdm(total=len(matrices), desc="Compressing", unit="matrix")
        with self._timed("compression"):
            for name in sorted(plain, key=lambda name: -sum(matrices[name].shape)):
                self._compress(compressor, name, None, None)
                self._attach(name)
            for stack in stacks:
                stack.compress(
                    chained, partial(self._compress, compressor), self._attach_block, self.finished
                )
        self._bar.close()
        if self.course:
            with self._timed("tuning"):
                tuning.tune(self.model, self.course, config.tune_steps, self.journal)
                config.measured = tuning.judged(self.model, self.course)

    def _compress(
        self, compressor: Compressor, name: str, change: Tensor | None, inputs: Tensor | None
    ) -> Tensor:
        device = weight_of(self.targets[name]).device
        result = compressor.recall(name) if name in self.finished else None
        if result is None:
            metrics, delta = self.metrics(name), self.delta(name)
            if change is not None:
                delta += change
                metrics = Metrics(metrics.outputs, inputs)
            result = compressor.compress(name, delta, metrics)
        elif result.packed is not None:
            result = replace(result, packed=result.packed.to(device))
        self._results[name] = result
        self._bar.update()
        base = oriented(self.targets[name], self._base_weight(name))
        weight = base.to(device, torch.float32)
        return weight if result.packed is None else weight + result.packed.dense()

    def _attach_block(self, block: str) -> None:
        for name in [name for name in self._results if name.startswith(f"{block}.")]:
            self._attach(name)

    def _attach(self, name: str) -> None:
        """Put the base weight and the packed delta where the fine-tuned weight was."""
        packed, error = self._results[name].packed, self._results[name].error
        target = self.targets[name]
        with torch.no_grad():
            weight_of(target).copy_(self._base_weight(name))
        if packed is None:
            self.config.dropped.append(name)
        else:
            self.config.errors[name] = error
        if isinstance(target, Expert):
            target.fused.finish(target.number, packed)
        elif packed is not None:
            attach_with_ties(self.model, name, packed.runs, packed.group_sizes, packed.tensors)
        del self._results[name]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        logger.info("%s took %.1f s", stage, spent)
