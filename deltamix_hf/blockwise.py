"""`statistics.collect` for a model of which one block at a time is in memory.

The same sums in the same order, in passes over the calibration batches: forward through the blocks,
keeping what enters each of them; through what follows the last block, for the predictions and their
gradients; backward, where each block is run again and its statistics are complete when all batches
have passed; and backward through what precedes the blocks. Without gradients the forward pass is
enough. Everything is kept in the journal, so an interrupted pass goes on at the block where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .errors import DeltaMixError
from .journal import Journal
from .metric import SecondMoment
from .stack import Reached, Shelf, Stack, run
from .statistics import (
    Hooks,
    LayerStatistics,
    backward,
    check_finite,
    embeddings_need_gradients,
    frozen,
    inputs_of,
    prediction,
)


class BlockwiseStatistics(Mapping[str, LayerStatistics]):
    """Statistics of every module that was called, each read from the journal when asked for.

    Args:
        stack: captured.
        modules: what is observed, by name.
        fisher: measure gradients too.
        seed: of ε.
        journal: with a folder.
        device: where they are wanted.

    Raises:
        DeltaMixError: the model gives NaN on the calibration data.
    """

    def __init__(
        self,
        stack: Stack,
        modules: Mapping[str, nn.Module],
        fisher: bool,
        seed: int,
        journal: Journal,
        device: torch.device,
    ):
        self.stack, self.fisher, self.seed, self.journal = stack, fisher, seed, journal
        self.device = device
        owner = {module: name for name in stack.names for module in _inside(name, modules)}
        outside = {n: m for n, m in modules.items() if n not in owner}
        self.inside = [
            {n: m for n, m in modules.items() if owner.get(n) == name} for name in stack.names
        ]
        if not self._known("entry"):
            self._measure(outside)
        self._facts: dict[str, Any] = {}
        for place in ("exit", "entry", *map(_place, range(len(stack.names)))):
            self._facts |= self._recall(place)["modules"]
        self.scored: int = self._recall("exit")["scored"]

    def _measure(self, outside: dict[str, nn.Module]) -> None:
        blocks = len(self.stack.names)
        self._bar = logging.tqdm(total=blocks * (1 + self.fisher), desc="Calibrating", unit="block")
        self._forward()
        first = self._called_first(outside)
        if not self._known("exit"):
            self._exit({n: m for n, m in outside.items() if n not in first})
        for i in reversed(range(blocks if self.fisher else 0)):
            if not self._known(_place(i)):
                self._back_through(i)
            self._gradients(i + 1).clear()
            self._bar.update()
        self._entry({n: m for n, m in outside.items() if n in first})
        self._gradients(0).clear()
        self._bar.close()

    # Passes

    def level(self, i: int) -> Shelf:
        """Hidden states that enter block i, a batch each."""
        return self.stack.shelf(f"level {i}") if i else self.stack.exact

    def _gradients(self, i: int) -> Shelf:
        """Gradients at level i, a batch each: [draws, rows, length, d]."""
        return self.stack.shelf(f"gradient {i}")

    @torch.no_grad()
    def _forward(self) -> None:
        for i, block in enumerate(self.stack.blocks):
            before, after = self.level(i), self.level(i + 1)
            observed = {} if self.fisher or self._known(_place(i)) else self.inside[i]
            if observed:
                after.clear()
            if len(after) < len(before):
                with self.stack.hold(block), self._observing(_place(i), observed):
                    for b in range(len(after), len(before)):
                        after.append(run(block, {}, before[b], self.stack.rest[i][b])[1])
            self._bar.update()

    def _called_first(self, outside: dict[str, nn.Module]) -> set[str]:
        """Which of the modules are called before the first block."""
        found: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: found.add(name)

        handles = [m.register_forward_pre_hook(note(n)) for n, m in outside.items()]
        try:
            with torch.no_grad(), self.stack.stubs(_stop):
                self.stack.forward(self.stack.batches[0])
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _exit(self, modules: dict[str, nn.Module]) -> None:
        """Through what follows the last block, and back to it."""
        random = torch.Generator().manual_seed(self.seed)
        last, gradients = self.level(len(self.stack.names)), self._gradients(len(self.stack.names))
        gradients.clear()
        scored = 0
        with self._observing("exit", modules) as facts, frozen(self.stack.model):
            for b, ids in enumerate(self.stack.batches):
                hidden = last[b].requires_grad_(self.fisher)
                found: list[Tensor] = []
                with torch.set_grad_enabled(self.fisher):
                    output = prediction(after_blocks(self.stack, ids, hidden))
                    if self.fisher:
                        take = _taker(hidden, found)
                        scored += backward(output, len(self.stack.batches), random, take)
                        gradients.append(torch.stack(found))
            facts["scored"] = scored

    def _back_through(self, i: int) -> None:
        """Run block i again with gradients, and take them from its output to its input."""
        block, before = self.stack.blocks[i], self.level(i)
        incoming, outgoing = self._gradients(i + 1), self._gradients(i)
        outgoing.clear()
        with self.stack.hold(block), self._observing(_place(i), self.inside[i]), frozen(block):
            for b in range(len(before)):
                hidden = before[b].requires_grad_()
                with torch.enable_grad():
                    output = run(block, {}, hidden, self.stack.rest[i][b])[1]
                outgoing.append(_back(output, incoming[b], hidden))

    def _entry(self, modules: dict[str, nn.Module]) -> None:
        """Through what precedes the blocks, and back to its embeddings."""
        model, gradients = self.stack.model, self._gradients(0)
        entered: list[Tensor] = []

        def stub(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            entered.append(hidden)
            raise Reached

        with (
            frozen(model),
            embeddings_need_gradients(model, self.fisher),
            self._observing("entry", modules),
            self.stack.stubs(stub),
            torch.set_grad_enabled(self.fisher),
        ):
            for b, ids in enumerate(self.stack.batches):
                self.stack.forward(ids)
                output = entered.pop()
                if output.requires_grad:
                    _back(output, gradients[b])

    # What is kept

    @contextmanager
    def _observing(self, place: str, modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
        """Keep the statistics of the modules when all batches have passed."""
        hooks = Hooks(modules, self.fisher)
        facts: dict[str, Any] = {}
        try:
            yield facts
        finally:
            found = hooks.close()
        if modules or not place.startswith("block"):
            check_finite(found)
            facts["modules"] = {}
            stored: dict[int, str] = {}  # q/k/v share their inputs
            for name, layer in found.items():
                facts["modules"][name] = self._keep(name, layer, stored)
            self.journal.write(f"statistics of {place}", {}, facts)

    def _keep(self, name: str, layer: LayerStatistics, stored: dict[int, str]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for side, moment in (("inputs", layer.inputs), ("gradients", layer.gradients)):
            if moment is None:
                continue
            if id(moment) not in stored:
                stored[id(moment)] = f"{side} of {name}"
                self.journal.write(stored[id(moment)], *moment.state())
            kept[side] = stored[id(moment)]
        if layer.tokens is not None:
            self.journal.write(f"tokens of {name}", {"tokens": layer.tokens})
        return kept | {"tokens": layer.tokens is not None}

    def _known(self, place: str) -> bool:
        return f"statistics of {place}" in self.journal

    def _recall(self, place: str) -> dict[str, Any]:
        found = self.journal.read(f"statistics of {place}")
        return {"modules": {}, "scored": 0} | (found[1] if found else {})

    # As a mapping

    def __getitem__(self, name: str) -> LayerStatistics:
        kept = self._facts[name]
        gradients = self._moment(kept["gradients"]) if "gradients" in kept else None
        tokens = self._part(f"tokens of {name}")[0]["tokens"] if kept["tokens"] else None
        return LayerStatistics(self._moment(kept["inputs"]), gradients, tokens)

    def _moment(self, part: str) -> SecondMoment:
        return SecondMoment.restored(*self._part(part))

    def _part(self, name: str) -> tuple[dict[str, Tensor], Any]:
        found = self.journal.read(name)
        if found is None:
            raise DeltaMixError(f"{self.journal.folder} was changed while it was in use")
        return {key: tensor.to(self.device) for key, tensor in found[0].items()}, found[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


def after_blocks(stack: Stack, ids: Tensor, hidden: Tensor) -> Any:
    """The model's output where `hidden` [rows, length, d] leaves its last block."""

    def stub(i: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden

    with stack.stubs(stub):
        return stack.model(**inputs_of(stack.model, ids))


def _stop(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    raise Reached


def _place(i: int) -> str:
    return f"block {i}"


def _inside(block: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in modules if name.startswith(f"{block}.")]


def _back(output: Tensor, gradients: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Gradients [draws, ...] of `output` taken back; those at the leaf `hidden` [draws, ...]."""
    found: list[Tensor] = []
    for draw, gradient in enumerate(gradients):
        output.backward(gradient, retain_graph=draw + 1 < len(gradients))
        if hidden is not None:
            _taker(hidden, found)()
    return torch.stack(found) if found else gradients.new_zeros(0)


def _taker(hidden: Tensor, found: list[Tensor]) -> Callable[[], None]:
    def take() -> None:
        assert hidden.grad is not None
        found.append(hidden.grad)
        hidden.grad = None

    return take
