"""`statistics.collect` for a model of which one block at a time is in memory.

The same sums in the same order, in passes over the calibration batches: forward through the blocks,
keeping what enters each of them; through what follows the last block, for the predictions and their
gradients; backward, where each block is run again and its statistics are complete when all batches
have passed; and backward through what precedes the blocks. Without gradients the forward pass is
enough. Everything is kept on disk, so an interrupted pass goes on at the block where it was.

Several workers take a share of the batches each and keep the sums over them. Who reads a statistic
merges those of all workers, in the order of their ranks: nobody waits for another before the next
block, and each moment is merged only by the one or two workers that need it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..jobs.resume_store import ResumeStore
from ..jobs.workers import Workers
from ..linalg.second_moments import SecondMoment
from ..nn.experts import Expert
from ..nn.probing import device_of, hooked
from .block_chain import BlockChain, run
from .expert_statistics import FEWEST
from .statistics import (
    LayerStatistics,
    backward,
    frozen,
    observed,
    output_gradients,
    prediction,
    sampled_backward,
)


class BlockwisePass:
    """Measure a chain block by block: statistics `found`, and how many predictions are `scored`.

    `chain` is captured, `modules` are observed, by name, `store` has a folder, and `workers` share
    the batches; `fisher` measures gradients too, with ε drawn by `seed` plus the worker's rank.
    Raises DeltaMixError if the model gives NaN on the calibration data.
    """

    def __init__(
        self,
        chain: BlockChain,
        modules: Mapping[str, nn.Module],
        fisher: bool,
        seed: int,
        store: ResumeStore,
        workers: Workers,
    ):
        self.chain, self.fisher, self.seed, self.store = chain, fisher, seed, store
        self.workers, self.device = workers, device_of(chain.model)
        self.found = StatisticsStore(store, self.device, workers)
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
        self.forward(self.mine, self._bar.update)
        first = self._called_first(outside)
        if not self.found.done("exit"):
            self._exit({n: m for n, m in outside.items() if n not in first})
        for i in reversed(range(blocks if self.fisher else 0)):
            if not self.found.done(_place(i)):
                self._back_through(i)
            self._forget("gradient", i + 1, self.mine)
            self._bar.update()
        self._entry({n: m for n, m in outside.items() if n in first})
        self._forget("gradient", 0, self.mine)
        self._bar.close()

    # What waits between the blocks: hidden states ("level") and their gradients, by batch

    def get(self, kind: str, i: int, b: int) -> Tensor:
        """Read "level" [rows, length, d] or "gradient" [draws, rows, length, d] of batch b."""
        if kind == "level" and i == 0:
            return self.chain.reference[b]
        return self.store.load(f"{kind} {i} of batch {b}", self.device)[0]["item"]

    def _put(self, kind: str, i: int, b: int, item: Tensor) -> None:
        self.store.write(f"{kind} {i} of batch {b}", {"item": item})

    def _forget(self, kind: str, i: int, batches: range) -> None:
        for b in batches:
            self.store.forget(f"{kind} {i} of batch {b}")

    def forget(self) -> None:
        """Drop all that `get` reads, of all workers."""
        for i in range(len(self.chain.names)):
            self._forget("level", i + 1, range(len(self.chain.batches)))

    # Passes

    @torch.no_grad()
    def forward(self, batches: Iterable[int], after: Callable[[], object] = lambda: None) -> None:
        """Have the level of every block there for these batches; what is missing is run.

        `after` is called after every block.
        """
        for i, block in enumerate(self.chain.blocks):
            missing = [b for b in batches if f"level {i + 1} of batch {b}" not in self.store]
            if not self.fisher and not self.found.done(_place(i)):
                observing = self.found.observing(_place(i), self.inside[i], False)
                with self.chain.hold(block), observing:
                    self._advance(i, block, self.mine)
            elif missing:
                with self.chain.hold(block):
                    self._advance(i, block, missing)
            after()

    def _advance(self, i: int, block: nn.Module, batches: Iterable[int]) -> None:
        for b in batches:
            hidden = self.get("level", i, b)
            self._put("level", i + 1, b, run(block, {}, hidden, self.chain.block_args[i][b])[1])

    def _called_first(self, outside: dict[str, nn.Module]) -> set[str]:
        """Which of the modules are called before the first block."""
        found: set[str] = set()
        with hooked(outside, lambda name, *call: found.add(name)), torch.no_grad():
            self.chain.before_blocks(self.chain.batches[0])
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
                output = prediction(self.chain.after_blocks(batches[b], hidden))
                if self.fisher:
                    scored, found = sampled_backward(output, len(batches), random, hidden)
                    counts["scored"] += scored
                    self._put("gradient", last, b, torch.stack(found))

    def _back_through(self, i: int) -> None:
        """Run block i again with gradients, and take them from its output to its input."""
        block = self.chain.blocks[i]
        observing = self.found.observing(_place(i), self.inside[i], True)
        with self.chain.hold(block), frozen(block), observing:
            for b in self.mine:
                hidden = self.get("level", i, b).detach().requires_grad_()
                with torch.enable_grad():
                    output = run(block, {}, hidden, self.chain.block_args[i][b])[1]
                incoming = self.get("gradient", i + 1, b)
                found = backward(output, incoming, len(incoming), hidden)
                self._put("gradient", i, b, torch.stack(found))

    def _entry(self, modules: dict[str, nn.Module]) -> None:
        """Through what precedes the blocks, and back to its embeddings."""
        observing = self.found.observing("entry", modules, self.fisher)
        with output_gradients(self.chain.model, self.fisher), observing:
            for b in self.mine:
                output, _ = self.chain.before_blocks(self.chain.batches[b])
                if output.requires_grad:
                    incoming = self.get("gradient", 0, b)
                    backward(output, incoming, len(incoming))


def _place(i: int) -> str:
    return f"block {i}"


class StatisticsStore(Mapping[str, LayerStatistics]):
    """Statistics of all modules that `workers` called, each read onto `device` when asked for."""

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
        """Context manager: as `observed`; what is counted meanwhile is kept too."""
        counts = Counter[str]()
        with observed(modules, fisher, seed=self.workers.rank) as found:
            yield counts
        written: dict[int, str] = {}  # q/k/v share their inputs
        kept = {name: self._write(name, layer, written) for name, layer in found.items()}
        tokens = {n: found[n].inputs.count for n in found if isinstance(modules[n], Expert)}
        facts = {"modules": kept, "experts": tokens, "counts": counts}
        self.store.write(self._place(place, self.workers.rank), {}, facts)

    def complete(self, place: str) -> Counter[str]:
        """Wait for all workers at a place; returns what they have counted there."""
        counts, experts = Counter[str](), Counter[str]()
        for rank in range(self.workers.size):
            _, facts = self.workers.wait(self.store, self._place(place, rank))
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
