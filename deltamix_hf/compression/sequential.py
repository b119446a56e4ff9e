"""Sequential target correction: each layer is fitted to what it will really receive.

Compressed layers hand slightly wrong inputs on, and these errors add up over depth. So blocks are
compressed in order, in stages (q/k/v, then o, then gate/up, then down: layers that read the same
tensor form a stage), and before each stage two streams of hidden states are run up to it, x_f with
the fine-tune's weights and x_c with the weights compressed so far. The new target

    ΔW* = ΔW + (W_ft·E[(x_f − x_c)·x_cᵀ] + E[(r_f − r_c)·x_cᵀ]) · (C + λI)⁻¹,   C = E[x_c·x_cᵀ]

asks the layer to give on x_c what the fine-tune gives on x_f, and, where its output is added to a
residual stream r, to make up for the error of that stream too. λ = 0.03·mean(diag C).

Layers outside a chain of blocks (`stack.py`) keep their plain target. Memory: the inputs of one
block's layers for all calibration tokens, and two streams of hidden states. Several workers share
the batches and the rows of the targets (`target_changes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.block_chain import Arguments, BlockArgs, BlockChain, TensorList, run, tensor_of
from ..jobs.workers import Workers
from ..nn.experts import expert_place, replace_expert
from ..nn.layers import matrix_of, oriented, shape_of, weight_of
from .sequential_sums import Rows, StageSums, all_rows, moved_rows, target_shift

Finish = Callable[[dict[str, Tensor | None], Tensor | None], dict[str, Tensor]]
"""({target: change of its delta [m, n]}, their input Gram [n, n]) -> compressed weights [m, n]."""
Owners = Callable[[Sequence[str]], dict[str, int]]
"""The worker that compresses each of the targets of a stage."""


@dataclass
class Stage:
    """Targets that read the same tensor, by name within the block, and what they are added to.

    `residual` is the module of the block whose input is the residual stream ("" is the block).
    """

    names: list[str]
    residual: str | None = None


@torch.no_grad()
def compress_blocks(
    chain: BlockChain,
    targets: Sequence[str],
    finish: Finish,
    done: Callable[[str], None],
    finished: Container[str] = (),
    workers: Workers | None = None,
    owners: Owners = lambda names: dict.fromkeys(names, 0),
) -> None:
    """Compress all blocks in order.

    `finish` compresses the targets of a stage and returns their new weights; `done(block)` is
    called when a block's compressed weights may be put into the model. The model must still hold
    the fine-tune's weights in every block not yet done. For targets that are `finished` already,
    `finish` needs no measurement; all `workers` must see the same there.
    """
    workers = workers or Workers()
    compressed, present = chain.entry()
    mine = workers.share(len(compressed))  # another's hidden states stay those of the first block
    known: list[str] | None = None
    stages: list[Stage] = []
    for i, (name, block) in enumerate(zip(chain.names, chain.blocks, strict=True)):
        inside = [t.removeprefix(f"{name}.") for t in targets if t.startswith(f"{name}.")]
        last = i + 1 == len(chain.blocks)
        over = all(f"{name}.{target}" in finished for target in inside)
        with chain.hold(block):
            if inside != known:  # blocks with the same targets have the same stages
                known = inside
                stages = find_stages(block, inside, chain.reference[0], chain.block_args[i][0])
            seen = _run_reference(chain, i, [] if over else stages, () if over and last else mine)
        made = _Made(chain, name, block)
        for stage in stages:
            names = [f"{name}.{target}" for target in stage.names]
            if all(full in finished for full in names):
                made.keep(finish(dict.fromkeys(names), None))
                continue
            with chain.hold(block):
                sums = _measured(
                    chain, block, stage, compressed, present[i], seen, made.weights(), workers
                )
                layers = {
                    full: block.get_submodule(target)
                    for full, target in zip(names, stage.names, strict=True)
                    if full not in finished
                }
                moved = {
                    full: moved_rows(matrix_of(layer).detach(), sums, workers)
                    for full, layer in layers.items()
                }
            heights = {full: shape_of(layer)[0] for full, layer in layers.items()}
            changes: dict[str, Tensor | None] = dict.fromkeys(names)
            changes |= target_shift(moved, heights, owners(names), sums, workers)
            made.keep(finish(changes, sums.inputs))
            del sums
        staged = {target for stage in stages for target in stage.names}
        if others := [f"{name}.{target}" for target in inside if target not in staged]:
            made.keep(finish(dict.fromkeys(others), None))  # not called exactly once: plain target
        with chain.hold(block):
            _run_compressed(block, made, compressed, present[i], () if last else mine)
        chain.block_args[i], present[i] = [], []
        done(name)


# What these two have in hand of the last batch goes with them: 0.5 GB of a block of 7B.


def _run_reference(
    chain: BlockChain, i: int, stages: Sequence[Stage], batches: Sequence[int]
) -> dict[str, TensorList]:
    """Take the fine-tune's hidden states through block i; inputs of the stages, by module."""
    watched = [s.names[0] for s in stages]
    watched += [s.residual for s in stages if s.residual is not None]
    seen = {module: chain.empty(f"input {module}") for module in dict.fromkeys(watched)}
    for b in batches:
        inputs, after = run(
            chain.blocks[i], {}, chain.reference[b], chain.block_args[i][b], list(seen)
        )
        chain.reference[b] = after
        for module, x in inputs.items():
            seen[module].append(x)
    return seen


def _run_compressed(
    block: nn.Module,
    made: _Made,
    compressed: TensorList,
    block_args: BlockArgs,
    batches: Sequence[int],
) -> None:
    """Take the compressed model's hidden states through a block."""
    weights = made.weights() if batches else {}
    for b in batches:
        _, compressed[b] = run(block, weights, compressed[b], block_args[b])


class _Made:
    """New weights of a block's targets, kept where its hidden states are."""

    def __init__(self, chain: BlockChain, name: str, block: nn.Module):
        self.chain, self.name, self.block = chain, name, block
        self.shelves: dict[str, TensorList] = {}

    def keep(self, matrices: dict[str, Tensor]) -> None:
        """Matrices [m, n] by the target's full name."""
        for full in list(matrices):
            target, matrix = full.removeprefix(f"{self.name}."), matrices.pop(full)
            if expert_place(self.block, target) is None:
                module = self.block.get_submodule(target)
                matrix = oriented(module, matrix).to(weight_of(module).dtype)
            self.shelves[target] = self.chain.empty(f"weight {target}")
            self.shelves[target].append(matrix)

    def weights(self) -> dict[str, Tensor]:
        """By the parameter's name; experts' in their whole parameter, which must be in memory."""
        found: dict[str, Tensor] = {}
        for target, tensor_list in self.shelves.items():
            if expert_place(self.block, target) is None:
                found[f"{target}.weight"] = tensor_list[0]
            else:
                replace_expert(found, self.block, target, tensor_list[0])
        return found


def _measured(
    chain: BlockChain,
    block: nn.Module,
    stage: Stage,
    compressed: TensorList,
    block_args: BlockArgs,
    seen: dict[str, TensorList],
    weights: dict[str, Tensor],
    workers: Workers,
) -> StageSums:
    """The sums of one stage over all batches.

    `seen` holds the inputs of the fine-tune's layers, for this worker's batches; `weights` are the
    new ones.
    """
    first, residual = stage.names[0], stage.residual
    watched = [first] if residual is None else [first, residual]
    mine = workers.share(len(compressed))

    def own() -> Iterator[Rows]:
        for at, b in enumerate(mine):
            found, _ = run(block, weights, compressed[b], block_args[b], watched, stop=first)
            rows = Rows(seen[first][at], found[first])
            if residual is not None:
                rows.reference_residual, rows.compressed_residual = (
                    seen[residual][at],
                    found[residual],
                )
            yield rows

    layer = block.get_submodule(first)
    n = shape_of(layer)[1]
    sums = StageSums(n, weight_of(layer).device, workers)
    for rows in all_rows(own(), n, len(compressed), chain.empty("rows of a stage"), workers):
        sums.add(rows)
    sums.finish()
    return sums


def find_stages(
    block: nn.Module, targets: Sequence[str], hidden: Tensor, block_args: Arguments
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
        result = tensor_of(block(hidden, *block_args[0], **block_args[1]))
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
