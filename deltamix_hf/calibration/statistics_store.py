"""Statistics in the journal: one part for each moment, and one for each place in the model.

Several workers add to the statistics of a place one after the other: each goes on from what the one
before it hands over, so the sums are those of one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeltaMixError
from ..jobs.resume_store import ResumeStore
from ..jobs.workers import Workers
from ..linalg.second_moments import SecondMoment
from .expert_statistics import Moments, enough, observed_experts
from .statistics import Hooks, LayerStatistics, check_finite


class StatisticsStore(Mapping[str, LayerStatistics]):
    """Statistics of every module that was called, each read when it is asked for.

    Args:
        journal: with a folder.
        device: where they are wanted.
        workers: who measure them.
    """

    def __init__(self, store: ResumeStore, device: torch.device, workers: Workers):
        self.store, self.device, self.workers = store, device, workers
        self.facts: dict[str, Any] = {}

    def done(self, place: str) -> bool:
        """Whether this worker has added its share of a place."""
        own = self._part(place, self.workers.rank)
        return own in self.store or self._part(place) in self.store

    @contextmanager
    def observing(
        self, place: str, modules: Mapping[str, nn.Module], fisher: bool
    ) -> Iterator[dict[str, Any]]:
        """Add up the statistics of modules that run meanwhile; the dict is handed over with them.

        Raises:
            DeltaMixError: the model gives NaN.
        """
        hooks, facts = Hooks(modules, fisher), dict[str, Any]()
        begun: dict[str, Moments] = {}
        if self.workers.rank:
            before = self.workers.rank - 1
            self.workers.wait(self.store, self._part(place, before))
            handed = self._read(self._part(place, before))[1]
            facts |= handed["facts"]
            hooks.found = self._layers(handed["modules"])
            begun = {n: (layer.inputs, layer.gradients) for n, layer in hooks.found.items()}
        try:
            with observed_experts(modules, fisher, begun) as experts:
                yield facts
        finally:
            found = hooks.close()
        found = {name: layer for name, layer in found.items() if name not in experts}
        experts = enough(experts) if self.workers.last else experts
        found |= {name: LayerStatistics(*moments) for name, moments in experts.items()}
        check_finite(found)
        own = None if self.workers.last else self.workers.rank
        stored: dict[int, str] = {}  # q/k/v share their inputs
        kept = {name: self._keep(name, layer, stored, own) for name, layer in found.items()}
        self.store.write(self._part(place, own), {}, {"modules": kept, "facts": facts})

    def complete(self, place: str) -> dict[str, Any]:
        """Have the statistics of a place, when all workers have added theirs; what came along."""
        self.workers.wait(self.store, self._part(place))
        kept = self._read(self._part(place))[1]
        self.facts |= kept["modules"]
        facts: dict[str, Any] = kept["facts"]
        return facts

    def _part(self, place: str, rank: int | None = None) -> str:
        return f"statistics of {place}" + ("" if rank is None else f" up to {rank}")

    def _keep(
        self, name: str, layer: LayerStatistics, stored: dict[int, str], rank: int | None
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        until = "" if rank is None else f" up to {rank}"
        for side, moment in (("inputs", layer.inputs), ("gradients", layer.gradients)):
            if moment is None:
                continue
            if id(moment) not in stored:
                stored[id(moment)] = f"{side} of {name}{until}"
                self.store.write(stored[id(moment)], *moment.state())
            kept[side] = stored[id(moment)]
        if layer.tokens is not None:
            kept["tokens"] = f"tokens of {name}{until}"
            self.store.write(kept["tokens"], {"tokens": layer.tokens})
        return kept

    def _layers(self, kept: Mapping[str, dict[str, Any]]) -> dict[str, LayerStatistics]:
        """Statistics to go on from; modules that share a moment share it again."""
        parts = {part for layer in kept.values() for part in layer.values()}
        moments = {part: self._moment(part) for part in parts if not part.startswith("tokens")}
        return {name: self._layer(layer, moments) for name, layer in kept.items()}

    def _layer(
        self, kept: Mapping[str, str], moments: Mapping[str, SecondMoment] | None = None
    ) -> LayerStatistics:
        sides = {
            side: moments[kept[side]] if moments is not None else self._moment(kept[side])
            for side in ("inputs", "gradients")
            if side in kept
        }
        tokens = self._read(kept["tokens"])[0]["tokens"] if "tokens" in kept else None
        return LayerStatistics(sides["inputs"], sides.get("gradients"), tokens)

    def _moment(self, part: str) -> SecondMoment:
        return SecondMoment.restored(*self._read(part))

    def _read(self, part: str) -> tuple[dict[str, Tensor], Any]:
        found = self.store.read(part)
        if found is None:
            raise DeltaMixError(f"{self.store.folder} was changed while it was in use")
        return {key: tensor.to(self.device) for key, tensor in found[0].items()}, found[1]

    # As a mapping

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layer(self.facts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)
