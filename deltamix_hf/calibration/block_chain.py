"""The blocks of a model as a chain that calibration batches run through, one block at a time.

Blocks are the elements of a `ModuleList` that are called once each, one on the other's output;
anything else (embeddings, heads, shared blocks) is no part of a chain. What a block gets besides
hidden states (positions, masks) comes from the model's own code, by running it: the first batch
through the blocks themselves, which shows whether they are a chain, the others through stubs in
their place where blocks hand on nothing but hidden states.

`hold` brings a module's weights into memory for a while, and `tensor_list` makes the list that
keeps the hidden states of one place; by default the weights are there, and the list is a list.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..jobs import resume_store
from ..nn.probing import hooked, inputs_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # a call's
BlockArgs = list[Arguments]
"""All arguments of a block's calls but the hidden states, a batch each."""
TensorList = list[Tensor] | resume_store.TensorList
Hold = Callable[[nn.Module], AbstractContextManager[Any]]
Act = Callable[[int, Tensor, Arguments], Tensor]
"""Called with a block's number, hidden states [rows, length, d] and the rest in its place."""


class Reached(Exception):
    """Ends a forward pass at the layer it was meant to reach."""


def find_blocks(model: nn.Module, targets: Collection[str]) -> list[list[str]]:
    """Find the outermost `ModuleList`s that hold targets; the names of their blocks."""
    stacks: list[list[str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for chain in stacks for block in chain)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks = [f"{name}.{i}" for i in range(len(module))]
            if any(t.startswith(f"{block}.") for t in targets for block in blocks):
                stacks.append(blocks)
    return stacks


def tensor_of(output: Any) -> Tensor:
    """Take the hidden states [rows, length, d] from a block's output, which may be a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class BlockChain:
    """A chain of blocks, by name in order, and the batches of token ids that run through it.

    `batches` are int64 [rows, length]; the model is in evaluation mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[str],
        batches: Sequence[Tensor],
        hold: Hold = nullcontext,
        tensor_list: Callable[[str], TensorList] = lambda name: [],
    ):
        self.model, self.names, self.batches = model, blocks, batches
        self.hold, self.tensor_list = hold, tensor_list
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.block_args: list[BlockArgs] = [[] for _ in blocks]
        self.reference = self.empty("reference")  # the fine-tune's hidden states, a batch each
        self.plain = True  # blocks return hidden states and nothing else

    def empty(self, name: str) -> TensorList:
        """Make a list of that name and clear it."""
        found = self.tensor_list(name)
        found.clear()
        return found

    @torch.no_grad()
    def capture(self) -> bool:
        """Record what enters the fine-tune's blocks; False if they are no chain."""
        for ids in self.batches:
            if len(self.reference) and self.plain:
                with self._stubs(self._record):
                    self._forward(ids)
            elif not self._capture_by_hooks(ids):
                return False
        return True

    def _record(self, i: int, hidden: Tensor, block_args: Arguments) -> Tensor:
        self.block_args[i].append(block_args)
        if i == 0:
            self.reference.append(hidden)
        return hidden

    def _capture_by_hooks(self, ids: Tensor) -> bool:
        """Record a batch; whether the blocks are called once each, one on the other's output."""
        called: list[str] = []
        last: list[Tensor] = []

        def before(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not args or (last and args[0] is not last[0]):
                called.clear()
                raise Reached
            called.append(name)
            self._record(self.names.index(name), args[0], (args[1:], kwargs))

        def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
            last[:] = [tensor_of(output)]
            self.plain = self.plain and isinstance(output, Tensor)

        with hooked(dict(zip(self.names, self.blocks, strict=True)), before, after):
            self._forward(ids)
        return called == self.names

    @contextmanager
    def _stubs(self, act: Act) -> Iterator[None]:
        """Context manager: call `act(i, hidden, block_args)` in place of block i."""
        modules = self.model.get_submodule(self.names[0].rpartition(".")[0])._modules
        own = dict(modules)
        modules |= {str(i): _Stub(block, i, act) for i, block in enumerate(self.blocks)}
        try:
            yield
        finally:
            modules |= own

    @torch.no_grad()
    def entry(self) -> tuple[TensorList, list[BlockArgs]]:
        """Record what enters the blocks with the model's present weights.

        Returns hidden states [rows, length, d] of the first block, a batch each, and the other
        arguments of all blocks: as the fine-tune's, but what the first block shares with later ones
        (the encoder's output in a decoder, say) is present too.
        """
        hidden = self.empty("compressed")
        present: list[BlockArgs] = [[] for _ in self.blocks]
        for b, ids in enumerate(self.batches):
            x, new = self.before_blocks(ids)
            hidden.append(x)
            for found, block_args in zip(present, self.block_args, strict=True):
                found.append(_shared(block_args[b], self.block_args[0][b], new))
        return hidden, present

    def before_blocks(self, ids: Tensor) -> tuple[Tensor, Arguments]:
        """Run what precedes the blocks: what the first gets, hidden states first."""
        found: list[tuple[Tensor, Arguments]] = []

        def stop(i: int, hidden: Tensor, block_args: Arguments) -> Tensor:
            found.append((hidden, block_args))
            raise Reached

        with self._stubs(stop):
            self._forward(ids)
        return found[0]

    def after_blocks(self, ids: Tensor, hidden: Tensor) -> Any:
        """Run what follows the blocks; the model's output for `hidden` [rows, length, d]."""
        with self._stubs(lambda i, x, block_args: hidden):
            return self.model(**inputs_of(self.model, ids))

    def _forward(self, ids: Tensor) -> None:
        """Run the model up to its last hidden states, or to where `Reached` is raised."""
        inner = getattr(self.model, self.model.base_model_prefix, self.model)  # no logits needed
        with suppress(Reached):
            inner(**inputs_of(self.model, ids))


class _Stub(nn.Module):
    """Stands in a block's place; whatever else is asked of it, the block answers."""

    def __init__(self, block: nn.Module, i: int, act: Act):
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule
        self.i, self.act = i, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.act(self.i, hidden, (args, kwargs))


def run(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    block_args: Arguments,
    watched: Sequence[str] = (),
    stop: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run one batch `hidden` [rows, length, d] through a block, up to its module `stop`.

    `weights` are new values of the block's parameters, by name. Returns the inputs of the `watched`
    modules ("" is the block), and what leaves the block (its input if it was stopped).
    """
    seen: dict[str, Tensor] = {"": hidden} if "" in watched else {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = args[0]
        if name == stop:
            raise Reached

    modules = {name: block.get_submodule(name) for name in watched if name}
    with hooked(modules, keep), suppress(Reached):
        output = functional_call(block, dict(weights), (hidden, *block_args[0]), block_args[1])
        return seen, tensor_of(output)
    return seen, hidden


def _shared(old: Arguments, first: Arguments, new: Arguments) -> Arguments:
    """`old`, with every tensor that is one of `first`'s replaced by `new`'s."""
    pairs = [
        *zip(first[0], new[0], strict=False),
        *((first[1][k], new[1][k]) for k in first[1] if k in new[1]),
    ]
    swap = {id(a): b for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)}
    args = tuple(swap.get(id(a), a) for a in old[0])
    return args, {k: swap.get(id(a), a) for k, a in old[1].items()}
