"""Sequential target correction: each layer is fitted to what it will really receive.

Compressed layers hand slightly wrong inputs on, and these errors add up over depth. So blocks are
compressed in order, in stages (q/k/v, then o, then gate/up, then down: layers that read the same
tensor form a stage), and before each stage two streams of hidden states are run up to it, x_f with
the fine-tune's weights and x_c with the weights compressed so far. The new target

    ΔW* = ΔW + (W_ft·E[(x_f − x_c)·x_cᵀ] + E[(r_f − r_c)·x_cᵀ]) · (C + λI)⁻¹,   C = E[x_c·x_cᵀ]

asks the layer to give on x_c what the fine-tune gives on x_f, and, where its output is added to a
residual stream r, to make up for the error of that stream too. λ = (0.03 + prior·n/N)·mean(diag C)
for N tokens: what few of them ask for in many directions is chance.

Layers outside a chain of blocks (`block_chain.py`) keep their plain target. Memory: the inputs of
one block's layers for all calibration tokens, and two streams of hidden states. Several workers
share the batches and the rows of the targets (`sequential_sums.py`).
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.block_chain import Arguments, BlockArgs, BlockChain, TensorList, run, tensor_of
from ..jobs.workers import ALONE, Workers
from ..nn.delta_module import oriented
from ..nn.experts import expert_place, replace_expert
from ..nn.layers import matrix_of, shape_of, weight_of
from ..nn.probing import hooked
from .sequential_sums import StageSums, moved_targets, target_shift

Finish = Callable[[dict[str, Tensor | None], Tensor | None], dict[str, Tensor]]
"""({target: change of its delta [m, n]}, their input Gram [n, n]) -> compressed weights [m, n]."""


@dataclass
class Stage:
    """Targets that read the same tensor, by name within the block, and what they are added to.

    `residual` is the module of the block whose input is the residual stream ("" is the block).
    """

    names: list[str]
    residual: str | None = None

    @property
    def watched(self) -> list[str]:
        """The modules whose inputs are summed: the first, which ends a run, and the residual's."""
        return [self.names[0], *([] if self.residual is None else [self.residual])]


@torch.no_grad()
def compress_blocks(
    chain: BlockChain,
    targets: Sequence[str],
    finish: Finish,
    done: Callable[[str], None],
    finished: Container[str] = (),
    workers: Workers = ALONE,
    prior: float = 0.0,
) -> None:
    """Compress `targets`, layers and experts by full name, in all blocks of a captured chain.

    The model must still hold the fine-tune's weights in every block not yet done: `done` is called
    with a block's name when the new ones, which `finish` returns for each stage, may be put into
    the model. For targets that are `finished`, the same for all `workers`, nothing is measured.
    """
    compressed, present = chain.entry()
    mine = workers.share(len(compressed))  # another's hidden states stay those of the first block
    stages: list[Stage] = []
    before: list[str] | None = None
    for i, name in enumerate(chain.names):
        state = BlockState(chain, i, targets, compressed, present[i], workers, prior)
        onward = () if i + 1 == len(chain.names) else mine  # hidden states nobody needs
        measured = not all(state.full(target) in finished for target in state.targets)
        with chain.hold(state.block):
            if state.targets != before:  # blocks with the same targets have the same stages
                before = state.targets
                entry, block_args = chain.reference[0], chain.block_args[i][0]
                stages = find_stages(state.block, state.targets, entry, block_args)
            state.run_reference(stages if measured else (), mine if measured else onward)
        for stage in stages:
            state.keep(finish(*state.changes(stage, finished)))
        staged = {target for stage in stages for target in stage.names}
        if others := [state.full(target) for target in state.targets if target not in staged]:
            state.keep(finish(dict.fromkeys(others), None))  # not called once: plain target
        with chain.hold(state.block):
            state.run_compressed(onward)
        chain.block_args[i], present[i] = [], []
        done(name)


@dataclass
class BlockState:
    """A block of the chain while its targets, by name within the block, are compressed."""

    chain: BlockChain
    index: int
    all_targets: Sequence[str]
    compressed: TensorList  # hidden states of the compressed model
    block_args: BlockArgs
    workers: Workers
    prior: float  # of `Method`
    # what the fine-tune's modules get, a tensor for each of this worker's batches
    seen: dict[str, TensorList] = field(default_factory=dict)
    # new weights of targets, each in a list of its own where hidden states are kept
    made: dict[str, TensorList] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.block, prefix = self.chain.blocks[self.index], self.full("")
        inside = [name for name in self.all_targets if name.startswith(prefix)]
        self.targets = [name.removeprefix(prefix) for name in inside]

    def full(self, target: str) -> str:
        """Return a target's name in the model."""
        return f"{self.chain.names[self.index]}.{target}"

    # Methods of their own, so that the last batch (0.5 GB in a block of 7B) is freed on return.

    def run_reference(self, stages: Sequence[Stage], batches: Sequence[int]) -> None:
        """Take the fine-tune's hidden states through the block, and see the inputs of stages."""
        reference, block_args = self.chain.reference, self.chain.block_args[self.index]
        watched = [name for stage in stages for name in stage.watched]
        self.seen = {name: self.chain.empty(f"input {name}") for name in dict.fromkeys(watched)}
        for b in batches:
            inputs, reference[b] = run(self.block, {}, reference[b], block_args[b], list(self.seen))
            for module, x in inputs.items():
                self.seen[module].append(x)

    def run_compressed(self, batches: Sequence[int]) -> None:
        """Take the compressed model's hidden states through the block."""
        weights = self.weights() if batches else {}
        for b in batches:
            _, self.compressed[b] = run(self.block, weights, self.compressed[b], self.block_args[b])

    def changes(
        self, stage: Stage, finished: Container[str]
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """Measure a stage: by full name the changes [m, n] of targets to do, and their C [n, n]."""
        modules = {self.full(target): self.block.get_submodule(target) for target in stage.names}
        missing = [name for name in modules if name not in finished]
        if not missing:
            return dict.fromkeys(modules), None
        with self.chain.hold(self.block):
            sums = self.sums(stage)
            weights = {name: matrix_of(modules[name]).detach() for name in missing}
            moved = moved_targets(weights, sums, self.workers)
            del weights
        owners = self.workers.owners({name: shape_of(m) for name, m in modules.items()})
        shift = target_shift(moved, owners, sums, self.workers, self.prior)
        return dict.fromkeys(modules) | shift, sums.inputs

    def sums(self, stage: Stage) -> StageSums:
        """Run the compressed model up to a stage; its sums over all workers' batches."""
        first, residual, weights = stage.names[0], stage.residual, self.weights()
        layer = self.block.get_submodule(first)
        sums = StageSums(*shape_of(layer), residual is not None, weight_of(layer).device)
        for at, b in enumerate(self.workers.share(len(self.compressed))):
            hidden, block_args = self.compressed[b], self.block_args[b]
            found, _ = run(self.block, weights, hidden, block_args, stage.watched, stop=first)
            pair = None if residual is None else (self.seen[residual][at], found[residual])
            sums.add(self.seen[first][at], found[first], pair)
        sums.reduce(self.workers)
        return sums

    def keep(self, matrices: dict[str, Tensor]) -> None:
        """Keep new weights [m, n] of targets by their full names; `matrices` is used up."""
        for name in list(matrices):
            target, matrix = name.removeprefix(self.full("")), matrices.pop(name)
            if expert_place(self.block, target) is None:
                module = self.block.get_submodule(target)
                matrix = oriented(module, matrix).to(weight_of(module).dtype)
            self.made[target] = self.chain.empty(f"weight {target}")
            self.made[target].append(matrix)

    def weights(self) -> dict[str, Tensor]:
        """Read new weights by the parameter's name; a parameter of experts must be in memory."""
        found: dict[str, Tensor] = {}
        for target, kept in self.made.items():
            if expert_place(self.block, target) is None:
                found[f"{target}.weight"] = kept[0]
            else:
                replace_expert(found, self.block, target, kept[0])
        return found


def find_stages(
    block: nn.Module, targets: Sequence[str], hidden: Tensor, block_args: Arguments
) -> list[Stage]:
    """Group the targets of a block by input tensor, in call order, with their residual streams.

    Targets, by name within the block, that are called more or less than once are left out. `hidden`
    [rows, length, d] enters the block.
    """
    order: list[str] = []
    inputs: dict[str, Tensor] = {}  # the first of each module
    outputs: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.setdefault(name, args[0])
            order.append(name)

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output

    modules = {n: m for n, m in block.named_modules() if n}
    inside = {n: modules[n] for n in targets if n in modules}  # experts, slices, are no modules
    with hooked(modules, before), hooked(inside, after=after):
        result = tensor_of(block(hidden, *block_args[0], **block_args[1]))
    stages: list[Stage] = []
    for name in order:
        if name not in outputs or order.count(name) != 1:
            continue
        if stages and inputs[stages[-1].names[0]] is inputs[name]:
            stages[-1].names.append(name)
        else:
            stages.append(Stage([name]))
    for stage in stages:
        (name, *others), at = stage.names, order.index(stage.names[0])
        if not others and outputs[name].shape == hidden.shape:
            streams = {"": hidden} | {n: inputs[n] for n in order[:at]}
            later = [inputs[n] for n in order[at + 1 :]] + [result]
            stage.residual = _residual_of(outputs[name], streams, later)
    return stages


def _residual_of(y: Tensor, streams: Mapping[str, Tensor], later: Sequence[Tensor]) -> str | None:
    """Find the module whose stream the target's output y is added to; None if there is none.

    The sum of both must be what a later module gets, or the block's result.
    """
    sums = [z for z in later if z.shape == y.shape]
    for module, stream in streams.items():
        if stream.shape == y.shape and any(
            torch.allclose(z, y + stream, rtol=1e-3, atol=1e-3 * float(z.abs().mean()))
            for z in sums
        ):
            return module
    return None
