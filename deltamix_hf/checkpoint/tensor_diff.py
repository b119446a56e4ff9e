"""Sort the tensors of a fine-tune by how they differ from the base.

What is identical is not stored; matrices (linear layers, embeddings, experts) are packed as ranks;
everything else that differs is stored whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from ..nn.experts import FusedWeight, fused_weights, is_experts
from ..nn.layers import delta_class, weight_of
from ..storage.names import ROWS
from .base import BaseCheckpoint, same
from .vocabulary import is_resized, one_for_each_token, vocabulary_modules

# At 64 x 64 the four header entries of a packed matrix (about 430 bytes) take most of a 1/16 share
# (512 bytes); anything smaller is stored whole.
_SMALLEST = 4096


# |ΔW| / |W|: two models that share nothing but their sizes are 1.41 apart; the farthest fine-tune
# met, trained long on other text, 0.62.
_UNRELATED = 0.9


_ROWS = 4096  # of a matrix in float32 at once


def sort_tensors(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    skip: Sequence[str],
    files: BaseCheckpoint | None = None,
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Modules to pack and tensors to store whole, by name; what equals the base is in neither.

    `files` has the model's tensors if they are not in memory.

    Raises:
        DeltaMixError: a tensor has another shape in the base, or is not finite.
    """
    targets: dict[str, nn.Module] = {}
    overlay: dict[str, Tensor] = {}
    tied = set(model.all_tied_weights_keys)
    ends = vocabulary_modules(model)
    moved = size = 0.0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if files is not None:
            if name not in files:
                raise DeltaMixError(f"the fine-tune's files hold no {name}: they are incomplete")
            tensor = files.read(name).to(tensor.dtype)
        module_name, _, leaf = name.rpartition(".")
        if name in base:
            value = base.read(name)
            if leaf == "weight" and is_resized(base, ends.get(module_name), name):
                base.resize(name, tensor)
                value = base.read(name)
                if (added := base.added(name)) is not None:
                    overlay[f"{module_name}.{ROWS}"] = added
            elif value.shape != tensor.shape and not one_for_each_token(ends.values(), tensor):
                raise DeltaMixError(
                    f"{name} is {list(tensor.shape)} in the fine-tune and {list(value.shape)} in "
                    "the base: this is not the base it was fine-tuned from"
                )
            if same(tensor, value):
                continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaMixError(f"{name} of the fine-tune holds NaN or infinite values")
        module = model.get_submodule(module_name)
        if name in base and packable_experts(module, name, skip):
            targets |= differing_experts(model, name, tensor, value)
        elif name in base and leaf == "weight" and packable(module, module_name, skip):
            targets[module_name] = module
        else:
            overlay[name] = tensor
            continue
        pairs = (t.flatten(0, -2).split(_ROWS) for t in (tensor, value))
        for rows, other in zip(*pairs, strict=True):
            other = other.to(tensor.device, torch.float32)
            moved += float((rows.float() - other).square().sum())
            size += float(other.square().sum())
    if moved > _UNRELATED**2 * size:
        warnings.warn(
            f"the fine-tune's weights are {(moved / size) ** 0.5 if size else math.inf:.2f} times "
            "the base's norm away from it: this does not look like a fine-tune of this base, and "
            "its delta will not be small; give the base it was made from",
            UserWarning,
            stacklevel=4,
        )
    return targets, overlay


def packable(module: nn.Module, name: str, skip: Sequence[str]) -> bool:
    """Whether the module's weight is stored as ranks, if it differs; `skip` names what is not."""
    return (
        delta_class(type(module)) is not None
        and weight_of(module).numel() >= _SMALLEST
        and not _skipped(name, skip)
    )


def packable_experts(module: nn.Module, name: str, skip: Sequence[str]) -> bool:
    """Whether the tensor `name` of the module holds experts that are stored as ranks."""
    owner, _, leaf = name.rpartition(".")
    return (
        is_experts(module)
        and leaf in fused_weights(module)
        and module.get_parameter(leaf)[0].numel() >= _SMALLEST
        and not _skipped(owner, skip)
        and not _skipped(name, skip)
    )


def differing_experts(
    model: PreTrainedModel, name: str, tensor: Tensor, base: Tensor
) -> dict[str, nn.Module]:
    """The experts of a 3-D parameter whose matrix is not the base's, by name."""
    fused = FusedWeight(model, name)
    pairs = enumerate(zip(tensor, base, strict=True))
    return {f"{name}.{i}": fused.expert(i) for i, (ours, its) in pairs if not same(ours, its)}


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(name == s or name.endswith("." + s) or name.startswith(s + ".") for s in skip)
