"""Statistics on disk: one part for each moment, and one for each place in the model.

Every worker keeps the sums over its own batches. Who reads a statistic merges those of all workers,
in the order of their ranks: nobody waits for another before the next block, and each moment is
merged only by the one or two workers that need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..jobs.resume_store import ResumeStore
from ..jobs.workers import Workers
from ..linalg.second_moments import SecondMoment
from .expert_statistics import FEWEST, observed_experts
from .statistics import Hooks, LayerStatistics, attached, check_finite


class StatisticsStore(Mapping[str, LayerStatistics]):
    """Statistics of every module that was called, each read when it is asked for.

    Args:
        store: with a folder.
        device: where they are wanted.
        workers: who measure them.
    """

    def __init__(self, store: ResumeStore, device: torch.device, workers: Workers):
        self.store, self.device, self.workers = store, device, workers
        self.parts: dict[str, list[dict[str, str]]] = {}  # of each worker, by kind of statistic

    def done(self, place: str) -> bool:
        """Tell whether this worker has measured its batches at a place."""
        return self._place(place, self.workers.rank) in self.store

    @contextmanager
    def observing(
        self, place: str, modules: Mapping[str, nn.Module], fisher: bool
    ) -> Iterator[Counter[str]]:
        """Context manager: measure modules while they run; what is counted meanwhile is kept too.

        Raises:
            DeltaMixError: the model gives NaN.
        """
        rank, counts = self.workers.rank, Counter[str]()
        hooks = Hooks(modules, fisher, seed=rank)
        with attached(hooks.handles), observed_experts(modules, fisher, seed=rank) as experts:
            yield counts
        tokens = {name: moments[0].count for name, moments in experts.items()}
        called = {n: LayerStatistics(*moments) for n, moments in experts.items() if tokens[n]}
        found = hooks.found | called
        check_finite(found)
        written: dict[int, str] = {}  # q/k/v share their inputs
        kept = {name: self._write(name, layer, written) for name, layer in found.items()}
        facts = {"modules": kept, "experts": tokens, "counts": counts}
        self.store.write(self._place(place, rank), {}, facts)

    def complete(self, place: str) -> Counter[str]:
        """Wait for all workers at a place; returns what they have counted there."""
        counts, experts = Counter[str](), Counter[str]()
        for rank in range(self.workers.size):
            part = self._place(place, rank)
            self.workers.wait(self.store, part)
            facts = self.store.load(part)[1]
            for name, kept in facts["modules"].items():
                self.parts.setdefault(name, []).append(kept)
            experts.update(facts["experts"])
            counts.update(facts["counts"])
        for name, tokens in experts.items():
            if tokens < FEWEST:
                self.parts.pop(name, None)
        return counts

    def _place(self, place: str, rank: int) -> str:
        return f"statistics of {place} by {rank}"

    def _write(self, name: str, layer: LayerStatistics, written: dict[int, str]) -> dict[str, str]:
        """Keep a module's statistics; the names of their parts."""
        kept: dict[str, str] = {}
        for side, moment in (("inputs", layer.inputs), ("gradients", layer.gradients)):
            if moment is None:
                continue
            if id(moment) not in written:
                written[id(moment)] = f"{side} of {name} by {self.workers.rank}"
                self.store.write(written[id(moment)], *moment.state())
            kept[side] = written[id(moment)]
        if layer.tokens is not None:
            kept["tokens"] = f"tokens of {name} by {self.workers.rank}"
            self.store.write(kept["tokens"], {"tokens": layer.tokens})
        return kept

    def _merged(self, name: str, side: str) -> SecondMoment | None:
        parts = [kept[side] for kept in self.parts[name] if side in kept]
        moments = (SecondMoment.restored(*self.store.load(part, self.device)) for part in parts)
        if (first := next(moments, None)) is not None:
            for other in moments:
                first.merge(other)
        return first

    # As a mapping

    def __getitem__(self, name: str) -> LayerStatistics:
        parts = [kept["tokens"] for kept in self.parts[name] if "tokens" in kept]
        tokens = [self.store.load(part, self.device)[0]["tokens"] for part in parts]
        inputs, gradients = self._merged(name, "inputs"), self._merged(name, "gradients")
        assert inputs is not None
        return LayerStatistics(inputs, gradients, sum(tokens[1:], tokens[0]) if tokens else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
