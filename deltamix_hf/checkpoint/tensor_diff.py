"""Compare the tensors of a fine-tune with the base's, and sort them by how they are stored.

What is identical is not stored; matrices (linear layers, embeddings, experts) are packed as ranks;
everything else that differs is stored whole.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from ..nn.delta_module import DeltaModule
from ..nn.experts import FusedWeight, fused_weights, is_experts
from ..nn.layers import delta_class, weight_of
from ..storage.names import ROWS
from .base import BaseCheckpoint, is_finite, same, untied_state
from .vocabulary import vocabulary_modules

# At 64 x 64 the four header entries of a packed matrix (about 430 bytes) take most of a 1/16 share
# (512 bytes); anything smaller is stored whole.
_SMALLEST = 4096
# |ΔW| / |W|: two models that share nothing but their sizes are 1.41 apart; the farthest fine-tune
# met, trained long on other text, 0.62.
_UNRELATED = 0.9
_ABSURD = 10.0  # at 1e4 the delta, at 1/16, had 800 times the KL of the base
_ROWS = 4096  # of a matrix in float32 at once


@dataclass(frozen=True)
class Difference:
    """A tensor of the fine-tune, by its name in the model, against the base's.

    Its kind is "same"; "matrix" or "experts", to be packed; "whole", to be stored as it is; or
    "rows", those of a resized vocabulary that the base has not.
    """

    name: str
    kind: str
    ours: Tensor
    base: Tensor | None  # of any dtype; None if it has none


def differences(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    tensors: Iterable[tuple[str, Tensor]],
    skip: Sequence[str] = (),
) -> Iterator[Difference]:
    """Compare tensors of a fine-tune, by model name, with the base's; one pair is in memory.

    `base` learns of vocabularies with more or fewer rows; modules and parameters in `skip` are not
    packed. Raises a DeltaMixError if a tensor is not finite, or has another shape in the base where
    fine-tuning does not change it.
    """
    ends = vocabulary_modules(model)
    for name, ours in tensors:
        owner, _, leaf = name.rpartition(".")
        value = None
        if name in base:
            resized = leaf == "weight" and owner in ends and _is_resized(base, name, ends[owner])
            added = base.resize(name, ours) if resized else None
            if added is not None:
                yield Difference(f"{owner}.{ROWS}", "rows", added, None)
            value = base.read(name)
            alone = name in base.untied and not isinstance(model.get_submodule(owner), DeltaModule)
            if alone and (same(ours, value) or not _is_near(ours, value)):
                value = None  # a head of its own, or one that no delta tells from a tied one
            elif value.shape != ours.shape:
                if not _may_differ(model, name, ours, value, ends):
                    raise DeltaMixError(
                        f"{name} is {list(ours.shape)} in the fine-tune and {list(value.shape)} in "
                        "the base: this is not the base it was fine-tuned from"
                    )
                value = None
            elif same(ours, value):
                yield Difference(name, "same", ours, value)
                continue
        for who, tensor in (("fine-tune", ours), ("base", value)):
            if tensor is not None and not is_finite(tensor):
                raise DeltaMixError(f"{name} of the {who} holds NaN or infinite values")
        kind = "whole" if value is None else _kind(model, name, skip)
        yield Difference(name, kind, ours, value)


def _is_near(ours: Tensor, value: Tensor) -> bool:
    """Tell whether a head is one that has been trained on from the embeddings `value`."""
    change = (ours.float() - value.float()).norm()
    return bool(change < _UNRELATED * value.float().norm())


def _is_resized(base: BaseCheckpoint, name: str, module: nn.Module) -> bool:
    """Tell whether the weight `name` of an embedding or head has other rows than the base's."""
    if delta_class(type(module)) is None and not isinstance(module, DeltaModule):
        return False
    rows, *rest = weight_of(module).shape
    shape = base.shape(name)
    return shape is not None and shape[0] != rows and list(shape[1:]) == rest


def _may_differ(
    model: PreTrainedModel, name: str, ours: Tensor, value: Tensor, ends: Mapping[str, nn.Module]
) -> bool:
    """Tell whether a fine-tune of this base may well have a tensor of another shape, stored whole.

    It may have more positions, another number of labels, and a head's bias for other tokens.
    """
    owner = name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding) and owner not in ends:
        return ours.shape[1:] == value.shape[1:]
    head = model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")
    bias = ours.ndim == 1 and len(ours) in [len(weight_of(end)) for end in ends.values()]
    return bias or (head and owner not in ends)


def _kind(model: PreTrainedModel, name: str, skip: Sequence[str]) -> str:
    """How a tensor that differs from the base's is stored."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if is_experts(module) and leaf in fused_weights(module):
        kind, size = "experts", module.get_parameter(leaf)[0].numel()
    elif leaf == "weight" and delta_class(type(module)) is not None:
        kind, size = "matrix", weight_of(module).numel()
    else:
        return "whole"
    skipped = _skipped(owner, skip) or (kind == "experts" and _skipped(name, skip))
    return "whole" if skipped or size < _SMALLEST else kind


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(name == s or name.endswith("." + s) or name.startswith(s + ".") for s in skip)


def sort_tensors(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    skip: Sequence[str],
    files: BaseCheckpoint | None = None,
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Sort into modules to pack and tensors to store whole, by name; not what equals the base.

    `files` has the model's tensors if they are not in memory; for the rest see `differences`.
    """
    targets: dict[str, nn.Module] = {}
    overlay: dict[str, Tensor] = {}
    moved = size = 0.0
    for found in differences(model, base, _untied(model, files), skip):
        name, ours, value = found.name, found.ours, found.base
        if found.kind in ("whole", "rows"):
            overlay[name] = ours
        if found.kind not in ("matrix", "experts") or value is None:
            continue
        if found.kind == "experts":
            fused, pairs = FusedWeight(model, name), zip(ours, value, strict=True)
            changed = [i for i, (mine, its) in enumerate(pairs) if not same(mine, its)]
            targets |= {f"{name}.{i}": fused.expert(i) for i in changed}
        else:
            owner = name.removesuffix(".weight")
            targets[owner] = model.get_submodule(owner)
        both = (t.flatten(0, -2).split(_ROWS) for t in (ours, value))
        for rows, other in zip(*both, strict=True):
            other = other.to(ours.device, torch.float32)
            moved += float((rows.float() - other).square().sum())
            size += float(other.square().sum())
    distance = (moved / size) ** 0.5 if size else math.inf if moved else 0.0
    far = (
        f"the fine-tune's weights are {distance:.2f} times the base's norm away from it: this does "
        "not look like a fine-tune of this base, {}; give the base it was made from"
    )
    if distance > _ABSURD:
        raise DeltaMixError(far.format("and its delta would be worse than none"))
    if distance > _UNRELATED:
        told = far.format("and its delta will not be small")
        warnings.warn(told, UserWarning, stacklevel=4)
    return targets, overlay


def _untied(model: PreTrainedModel, files: BaseCheckpoint | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the fine-tune's tensors that are not tied to others, in the model's dtypes."""
    for name, tensor in untied_state(model).items():
        if files is not None and name not in files:
            raise DeltaMixError(f"the fine-tune's files hold no {name}: they are incomplete")
        yield name, tensor if files is None else files.read(name).to(tensor.dtype)
