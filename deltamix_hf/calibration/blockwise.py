"""`statistics.collect` for a model of which one block at a time is in memory.

The same sums in the same order, in passes over the calibration batches: forward through the blocks,
keeping what enters each of them; through what follows the last block, for the predictions and their
gradients; backward, where each block is run again and its statistics are complete when all batches
have passed; and backward through what precedes the blocks. Without gradients the forward pass is
enough. Everything is kept on disk, so an interrupted pass goes on at the block where it was.

Several workers take a share of the batches each, and their sums are merged when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..jobs.resume_store import ResumeStore
from ..jobs.workers import Workers
from .block_chain import BlockChain, Reached, run
from .statistics import attached, backward, embeddings_need_gradients, frozen, inputs_of, prediction
from .statistics_store import StatisticsStore


class BlockwisePass:
    """Measure a chain block by block: statistics `found`, and how many predictions are `scored`.

    Args:
        chain: captured.
        modules: what is observed, by name.
        fisher: measure gradients too.
        seed: of ε; each worker adds its rank.
        store: with a folder.
        device: where the statistics are wanted.
        workers: who share the batches.

    Raises:
        DeltaMixError: the model gives NaN on the calibration data.
    """

    def __init__(
        self,
        chain: BlockChain,
        modules: Mapping[str, nn.Module],
        fisher: bool,
        seed: int,
        store: ResumeStore,
        device: torch.device,
        workers: Workers,
    ):
        self.chain, self.fisher, self.seed, self.store = chain, fisher, seed, store
        self.device, self.workers = device, workers
        self.found = StatisticsStore(store, device, workers)
        self.mine = workers.share(len(chain.batches))
        self.inside = [
            {n: m for n, m in modules.items() if n.startswith(f"{name}.")} for name in chain.names
        ]
        within = {name for block in self.inside for name in block}
        outside = {n: m for n, m in modules.items() if n not in within}
        if not self.found.done("entry"):
            self._measure(outside)
        for place in ("entry", *map(_place, range(len(chain.names)))):
            self.found.complete(place)
        self.scored = self.found.complete("exit")["scored"]

    def _measure(self, outside: dict[str, nn.Module]) -> None:
        blocks = len(self.chain.names)
        steps = blocks * (1 + self.fisher)
        self._bar = logging.tqdm(total=steps, desc="Calibrating", unit="block")
        self._forward()
        first = self._called_first(outside)
        if not self.found.done("exit"):
            self._exit({n: m for n, m in outside.items() if n not in first})
        for i in reversed(range(blocks if self.fisher else 0)):
            if not self.found.done(_place(i)):
                self._back_through(i)
            self.forget("gradient", i + 1, self.mine)
            self._bar.update()
        self._entry({n: m for n, m in outside.items() if n in first})
        self.forget("gradient", 0, self.mine)
        self._bar.close()

    # What waits between the blocks: hidden states ("level") and their gradients, by batch

    def get(self, kind: str, i: int, b: int) -> Tensor:
        """Read hidden states ("level", [rows, length, d]) or gradients ([draws, rows, length, d]).

        They are those of batch b at the entrance of block i, on the device.
        """
        if kind == "level" and i == 0:
            return self.chain.reference[b]
        return self.store.load(f"{kind} {i} of batch {b}", self.device)[0]["item"]

    def _put(self, kind: str, i: int, b: int, item: Tensor) -> None:
        self.store.write(f"{kind} {i} of batch {b}", {"item": item})

    def forget(self, kind: str, i: int, batches: range) -> None:
        """Drop what `get` reads."""
        for b in batches:
            self.store.forget(f"{kind} {i} of batch {b}")

    # Passes

    @torch.no_grad()
    def _forward(self) -> None:
        for i, block in enumerate(self.chain.blocks):
            missing = [b for b in self.mine if f"level {i + 1} of batch {b}" not in self.store]
            if not self.fisher and not self.found.done(_place(i)):
                with (
                    self.chain.hold(block),
                    self.found.observing(_place(i), self.inside[i], False),
                ):
                    self._advance(i, block, self.mine)
            elif missing:
                with self.chain.hold(block):
                    self._advance(i, block, missing)
            self._bar.update()

    def _advance(self, i: int, block: nn.Module, batches: Any) -> None:
        for b in batches:
            hidden = self.get("level", i, b)
            self._put("level", i + 1, b, run(block, {}, hidden, self.chain.block_args[i][b])[1])

    def _called_first(self, outside: dict[str, nn.Module]) -> set[str]:
        """Which of the modules are called before the first block."""
        found: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: found.add(name)

        handles = [m.register_forward_pre_hook(note(n)) for n, m in outside.items()]
        with attached(handles), torch.no_grad(), self.chain.stubs(_stop):
            self.chain.forward(self.chain.batches[0])
        return found

    def _exit(self, modules: dict[str, nn.Module]) -> None:
        """Through what follows the last block, and back to it."""
        random = torch.Generator().manual_seed(self.seed + self.workers.rank)
        last, batches = len(self.chain.names), self.chain.batches
        with (
            frozen(self.chain.model),
            self.found.observing("exit", modules, self.fisher) as counts,
            torch.set_grad_enabled(self.fisher),
        ):
            for b in self.mine:
                hidden = self.get("level", last, b).detach().requires_grad_(self.fisher)
                output = prediction(after_blocks(self.chain, batches[b], hidden))
                if self.fisher:
                    found: list[Tensor] = []
                    take = _taker(hidden, found)
                    counts["scored"] += backward(output, len(batches), random, take)
                    self._put("gradient", last, b, torch.stack(found))

    def _back_through(self, i: int) -> None:
        """Run block i again with gradients, and take them from its output to its input."""
        block = self.chain.blocks[i]
        with (
            self.chain.hold(block),
            frozen(block),
            self.found.observing(_place(i), self.inside[i], True),
        ):
            for b in self.mine:
                hidden = self.get("level", i, b).detach().requires_grad_()
                with torch.enable_grad():
                    output = run(block, {}, hidden, self.chain.block_args[i][b])[1]
                incoming = self.get("gradient", i + 1, b)
                self._put("gradient", i, b, _back(output, incoming, hidden))

    def _entry(self, modules: dict[str, nn.Module]) -> None:
        """Through what precedes the blocks, and back to its embeddings."""
        model = self.chain.model
        entered: list[Tensor] = []

        def stub(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            entered.append(hidden)
            raise Reached

        with (
            frozen(model),
            embeddings_need_gradients(model, self.fisher),
            self.found.observing("entry", modules, self.fisher),
            self.chain.stubs(stub),
            torch.set_grad_enabled(self.fisher),
        ):
            for b in self.mine:
                self.chain.forward(self.chain.batches[b])
                output = entered.pop()
                if output.requires_grad:
                    _back(output, self.get("gradient", 0, b))


def after_blocks(chain: BlockChain, ids: Tensor, hidden: Tensor) -> Any:
    """Run what follows the blocks; the model's output for `hidden` [rows, length, d]."""

    def stub(i: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden

    with chain.stubs(stub):
        return chain.model(**inputs_of(chain.model, ids))


def _stop(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    raise Reached


def _place(i: int) -> str:
    return f"block {i}"


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
