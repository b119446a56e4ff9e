"""What a delta puts beside vLLM's model: built apart from it, then put there as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear

from ..checkpoint.delta_repo import StoredDelta, check_finite
from ..errors import DeltaMixError
from ..storage.names import packed_part
from .batch import Batch, by_row
from .layers import LayerDeltas, deltas_of
from .loader import BaseRepo, check_arrived, finding_places
from .partition import Piece

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Beside:
    """This rank's tensors of a delta, and the parts of the model that take them."""

    contents: str  # the same for the same delta only
    pieces: list[tuple[LayerDeltas, list[Piece]]]
    biases: list[tuple[LayerDeltas, Tensor]]  # what is added to the base's, float32
    norms: list[tuple[Any, str, Tensor]]  # a module, and what takes the place of its parameter

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        packed = sum(sum(p.packed.nbytes.values()) for _, some in self.pieces for p in some)
        whole = [*(t for _, t in self.biases), *(t for _, _, t in self.norms)]
        return packed + sum(t.numel() * t.element_size() for t in whole)

    def to(self, device: torch.device) -> Beside:
        """Copy to `device`; the same memory if it is there."""
        pieces = [
            (deltas, [Piece(outputs, packed.to(device)) for outputs, packed in some])
            for deltas, some in self.pieces
        ]
        biases = [(deltas, change.to(device)) for deltas, change in self.biases]
        norms = [(module, name, value.to(device)) for module, name, value in self.norms]
        return Beside(self.contents, pieces, biases, norms)

    def put(self, number: int, batch: Batch) -> None:
        """Let rows of the delta `number` take it."""
        for deltas, some in self.pieces:
            deltas.requested[number] = some
        for deltas, change in self.biases:
            deltas.biases[number] = change
        for module, name, value in self.norms:
            parameter = nn.Parameter(value, requires_grad=False)
            by_row(module, batch).setdefault(number, {})[name] = parameter

    def take_off(self, number: int) -> None:
        """Undo `put`."""
        for deltas, _ in self.pieces:
            deltas.requested.pop(number, None)
        for deltas, _ in self.biases:
            deltas.biases.pop(number, None)
        for module, _, _ in self.norms:
            module.dm_overlays.pop(number, None)


@torch.no_grad()
def build(model: Any, base: BaseRepo, delta: StoredDelta, group_size: int, contents: str) -> Beside:
    """Make what a delta puts beside the model, in host memory; the model stays as it is.

    Raises DeltaMixError if a part of the delta has no place in the model, or cannot share it.
    """
    places = deltas_of(model).values()
    try:
        whole = _loaded(model, base.changes(delta), delta.source)
        check_arrived(model, delta)
        pieces = [(d, d.take(layer, group_size, _HOST)) for layer, d in places if d.incoming]
    finally:
        for _, place in places:
            place.incoming.clear()
    found = Beside(contents, pieces, [], [])
    for name, value in whole.items():
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        deltas = getattr(module, "deltas", None) if leaf == "bias" else None
        check_finite(name, value)
        if deltas is not None and not getattr(module, "skip_bias_add", False):
            if not isinstance(module, RowParallelLinear) or module.tp_rank == 0:
                change = value.float() - module.bias.float()
                check_finite(name, change, value.dtype)
                found.biases.append((deltas, change.to(_HOST)))
        elif "norm" in type(module).__name__.lower() and leaf in module._parameters:
            found.norms.append((module, leaf, value.to(_HOST)))
        else:
            raise DeltaMixError(
                f"the delta changes {name} of a {type(module).__name__}, which cannot differ "
                "from one row to the next: serve it by itself"
            )
    return found


def _loaded(model: Any, weights: list[tuple[str, Tensor]], source: str) -> dict[str, Tensor]:
    """Let vLLM load these tensors, and return the whole ones by their names in its model.

    Packed tensors are kept by their layers. Whole ones are loaded in the place of the base's, taken
    from there, and the base's put back: so vLLM cuts and joins them as it would.
    """
    held = _takes_whole(model)
    before = {name: tensor.clone() for name, tensor in held.items()}
    whole = {key: tensor for key, tensor in weights if packed_part(key) is None}
    try:
        with finding_places(model):
            model.load_weights([(key, t) for key, t in weights if key not in whole])
            for key, tensor in whole.items():
                _load_one(model, key, tensor, source)
        return {name: t.clone() for name, t in held.items() if not _same(t, before[name])}
    finally:
        for name, tensor in held.items():
            tensor.copy_(before[name])


def _load_one(model: Any, key: str, tensor: Tensor, source: str) -> None:
    try:
        arrived = model.load_weights([(key, tensor)])
    except (KeyError, ValueError):
        arrived = None
    if not arrived:
        raise DeltaMixError(
            f"{key} of {source!r} has no place in vLLM's {type(model).__name__}: serve what "
            "'deltamix merge' makes of it"
        )


def _takes_whole(model: nn.Module) -> dict[str, Tensor]:
    """All that a vector may be loaded into, parameters and buffers, a row of a matrix too.

    So not the matrices that have a place for packed deltas, nor stacks of experts' matrices.
    """
    layers = [module for module in model.modules() if hasattr(module, "deltas")]
    matrices = {id(getattr(layer, "weight", None)) for layer in layers}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: tensor.detach()
        for name, tensor in tensors
        if tensor.ndim <= 2 and id(tensor) not in matrices
    }


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal, NaN and NaN too."""
    return bool(((tensor == other) | (tensor.isnan() & other.isnan())).all())
