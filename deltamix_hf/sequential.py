"""Sequential target correction: each layer is fitted to what it will really receive.

Compressed layers hand slightly wrong inputs on, and these errors add up over depth. So blocks are
compressed in order, in stages (q/k/v, then o, then gate/up, then down: layers that read the same
tensor form a stage), and before each stage two streams of hidden states are run up to it, x_f with
the fine-tune's weights and x_c with the weights compressed so far. The new target

    ΔW* = ΔW + (W_ft·E[(x_f − x_c)·x_cᵀ] + E[(r_f − r_c)·x_cᵀ]) · (C + λI)⁻¹,   C = E[x_c·x_cᵀ]

asks the layer to give on x_c what the fine-tune gives on x_f, and, where its output is added to a
residual stream r, to make up for the error of that stream too. λ = 0.03·mean(diag C).

Blocks are the elements of a `ModuleList` that are called once each, one on the other's output;
anything else (embeddings, heads, shared blocks, fused experts) keeps its plain target. Memory: the
inputs of one block's layers for all calibration tokens, and two streams of hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .experts import replace_expert
from .gptq import cholesky, damp
from .metric import SecondMoment
from .modules import matrix_of, oriented, weight_of
from .statistics import inputs_of

RIDGE = 0.03

Finish = Callable[[str, Tensor | None, Tensor | None], Tensor]
"""(target, change of its delta [m, n], its input Gram [n, n]) -> its compressed weight [m, n]."""


class _Reached(Exception):
    """Ends a forward pass at the layer it was meant to reach."""


@dataclass
class Stage:
    """Targets that read the same tensor, by name within the block, and what they are added to.

    `residual` is the module of the block whose input is the residual stream ("" is the block).
    """

    names: list[str]
    residual: str | None = None


Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # a call's
Rest = list[Arguments]
"""All arguments of a block's calls but the hidden states, a batch each."""


def find_blocks(model: nn.Module, targets: Sequence[str]) -> list[list[str]]:
    """Names of the blocks of every outermost `ModuleList` that holds targets."""
    stacks: list[list[str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for stack in stacks for block in stack)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks = [f"{name}.{i}" for i in range(len(module))]
            if any(t.startswith(f"{block}.") for t in targets for block in blocks):
                stacks.append(blocks)
    return stacks


def tensor_of(output: Any) -> Tensor:
    """Hidden states of a block's output, which may be a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class Stack:
    """One stack of blocks and the calibration batches that run through it."""

    def __init__(self, model: PreTrainedModel, blocks: list[str], batches: Sequence[Tensor]):
        self.model, self.names, self.batches = model, blocks, batches
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.rest: list[Rest] = [[] for _ in blocks]
        self.exact: list[Tensor] = []  # hidden states of the fine-tune
        self.usable = True

    @torch.no_grad()
    def capture(self) -> bool:
        """Run the fine-tune once; False if the blocks are not a plain chain."""
        last: list[Tensor | None] = [None]

        def before(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                chained = bool(args) and (i == 0 or args[0] is last[0])
                if not chained or len(self.rest[i]) != self._batch:
                    self.usable = False
                    raise _Reached
                self.rest[i].append((args[1:], kwargs))
                if i == 0:
                    self.exact.append(args[0])

            return hook

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last[0] = tensor_of(output)

        handles = [
            b.register_forward_pre_hook(before(i), with_kwargs=True)
            for i, b in enumerate(self.blocks)
        ]
        handles += [b.register_forward_hook(after) for b in self.blocks]
        try:
            for batch, ids in enumerate(self.batches):
                self._batch = batch
                self._forward(ids)
                complete = all(len(rest) == batch + 1 for rest in self.rest)
                self.usable = self.usable and complete
                if not self.usable:
                    break
        finally:
            for handle in handles:
                handle.remove()
        return self.usable

    @torch.no_grad()
    def entry(self) -> tuple[list[Tensor], list[Rest]]:
        """What enters the blocks with the model's present weights.

        Hidden states of the first block, a batch each, and the other arguments of all blocks: as
        the fine-tune's, but what the first block shares with later ones (the encoder's output in a
        decoder, say) is present too.
        """
        hidden: list[Tensor] = []
        first: Rest = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0])
            first.append((args[1:], kwargs))
            raise _Reached

        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for ids in self.batches:
                self._forward(ids)
        finally:
            handle.remove()
        present = [
            [
                _shared(old, self.rest[0][b], new)
                for b, (old, new) in enumerate(zip(rest, first, strict=True))
            ]
            for rest in self.rest
        ]
        return hidden, present

    def _forward(self, ids: Tensor) -> None:
        inner = getattr(self.model, self.model.base_model_prefix, self.model)  # no logits needed
        with contextlib.suppress(_Reached):
            inner(**inputs_of(self.model, ids))

    @torch.no_grad()
    def compress(
        self,
        targets: Sequence[str],
        finish: Finish,
        done: Callable[[str], None],
        finished: Container[str] = (),
    ) -> None:
        """Compress all blocks in order.

        `finish` compresses one target and returns its new weight; `done(block)` is called when
        a block's compressed weights may be put into the model. The model must still hold the
        fine-tune's weights in every block not yet done. For targets that are `finished` already,
        `finish` needs no measurement.
        """
        coarse, present = self.entry()
        exact, self.exact = self.exact, []
        known: list[str] | None = None
        stages: list[Stage] = []
        for i, (name, block) in enumerate(zip(self.names, self.blocks, strict=True)):
            rest = self.rest[i]
            inside = [t.removeprefix(f"{name}.") for t in targets if t.startswith(f"{name}.")]
            if inside != known:  # blocks with the same targets have the same stages
                known, stages = inside, find_stages(block, inside, exact[0], rest[0])
            watched = sorted({s.names[0] for s in stages} | {s.residual or "" for s in stages})
            seen: list[dict[str, Tensor]] = []
            for b, hidden in enumerate(exact):
                inputs, exact[b] = _run(block, {}, hidden, rest[b], watched)
                seen.append(inputs)
            weights: dict[str, Tensor] = {}
            for stage in stages:
                names = [f"{name}.{target}" for target in stage.names]
                if all(full in finished for full in names):
                    for target, full in zip(stage.names, names, strict=True):
                        _replace(weights, block, target, finish(full, None, None))
                else:
                    self._stage(block, name, stage, coarse, present[i], seen, weights, finish)
            staged = {target for stage in stages for target in stage.names}
            for target in inside:
                if target not in staged:  # not called exactly once: plain target
                    matrix = finish(f"{name}.{target}", None, None)
                    replace_expert(weights, block, target, matrix)
            if i + 1 < len(self.blocks):
                for b, hidden in enumerate(coarse):
                    _, coarse[b] = _run(block, weights, hidden, present[i][b], [])
            self.rest[i], present[i] = [], []
            done(name)

    def _stage(
        self,
        block: nn.Module,
        name: str,
        stage: Stage,
        coarse: list[Tensor],
        rest: Rest,
        seen: list[dict[str, Tensor]],
        weights: dict[str, Tensor],
        finish: Finish,
    ) -> None:
        """Compress the targets of one stage; puts their new weights into `weights`.

        `seen` holds the inputs of the fine-tune's layers, a batch each.
        """
        first, residual = stage.names[0], stage.residual
        n = seen[0][first].shape[-1]
        gram = SecondMoment(n, full=n)  # a sketch has no usable inverse
        drift = torch.zeros(n, n, device=seen[0][first].device)
        lag: Tensor | None = None
        for b, hidden in enumerate(coarse):
            watched = [first] if residual is None else [first, residual]
            inputs, _ = _run(block, weights, hidden, rest[b], watched, stop=first)
            x = inputs[first].reshape(-1, n).float()
            gram.add(x)
            drift.addmm_((seen[b][first].reshape(-1, n).float() - x).T, x)
            if residual is not None:
                late = (seen[b][residual] - inputs[residual]).flatten(0, -2).float()
                lag = late.T @ x if lag is None else lag.addmm_(late.T, x)
        inner = gram.mean()
        solver = cholesky(damp(inner, RIDGE))
        for target in stage.names:
            moved = matrix_of(block.get_submodule(target)).detach().float() @ drift
            if lag is not None:
                moved += lag
            change = torch.cholesky_solve((moved / gram.count).double().T, solver).T.float()
            _replace(weights, block, target, finish(f"{name}.{target}", change, inner))


def _replace(weights: dict[str, Tensor], block: nn.Module, target: str, matrix: Tensor) -> None:
    """Enter the new matrix [m, n] of a target as its weight."""
    module = block.get_submodule(target)
    weights[f"{target}.weight"] = oriented(module, matrix).to(weight_of(module).dtype)


def find_stages(
    block: nn.Module, targets: Sequence[str], hidden: Tensor, rest: Arguments
) -> list[Stage]:
    """Targets of a block in call order, grouped by input tensor, with their residual streams.

    Targets that are called more or less than once are left out.
    """
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    order: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(name, []).append(args[0])
                order.append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[name] = output

        return hook

    modules = {n: m for n, m in block.named_modules() if n}
    targets = [t for t in targets if t in modules]  # experts are slices of a parameter
    handles = [m.register_forward_pre_hook(before(n)) for n, m in modules.items()]
    handles += [modules[t].register_forward_hook(after(t)) for t in targets]
    try:
        result = tensor_of(block(hidden, *rest[0], **rest[1]))
    finally:
        for handle in handles:
            handle.remove()
    called = [n for n in order if n in targets and len(inputs[n]) == 1]
    stages: list[Stage] = []
    for name in called:
        same = stages and inputs[stages[-1].names[0]][0] is inputs[name][0]
        if same:
            stages[-1].names.append(name)
        else:
            stages.append(Stage([name]))
    for stage in stages:
        if len(stage.names) == 1 and (y := outputs[stage.names[0]]).shape == hidden.shape:
            at = order.index(stage.names[0])
            streams = [("", hidden)] + [(n, inputs[n][0]) for n in order[:at]]
            later = [inputs[n][0] for n in order[at + 1 :]] + [result]
            sums = [z for z in later if z.shape == y.shape]
            for name, stream in streams:
                near = stream.shape == y.shape and any(
                    torch.allclose(z, y + stream, rtol=1e-3, atol=1e-3 * float(z.abs().mean()))
                    for z in sums
                )
                if near:
                    stage.residual = name
                    break
    return stages


def _shared(
    old: Arguments,
    first: Arguments,
    new: Arguments,
) -> Arguments:
    """`old`, with every tensor that is one of `first`'s replaced by `new`'s."""
    pairs = [
        *zip(first[0], new[0], strict=False),
        *((first[1][k], new[1][k]) for k in first[1] if k in new[1]),
    ]
    swap = {id(a): b for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)}
    args = tuple(swap.get(id(a), a) for a in old[0])
    return args, {k: swap.get(id(a), a) for k, a in old[1].items()}


def _run(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    rest: Arguments,
    watched: Sequence[str],
    stop: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One batch through a block with some weights replaced; inputs of the watched modules.

    Ends at the module `stop`, if given; the hidden states are then the block's input.
    """
    seen: dict[str, Tensor] = {"": hidden} if "" in watched else {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]
            if name == stop:
                raise _Reached

        return keep

    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watched if name
    ]
    try:
        output = functional_call(block, dict(weights), (hidden, *rest[0]), rest[1])
        return seen, tensor_of(output)
    except _Reached:
        return seen, hidden
    finally:
        for handle in handles:
            handle.remove()
