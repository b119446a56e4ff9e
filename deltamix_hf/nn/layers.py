"""`DeltaLinear`, `DeltaConv1D` and `DeltaEmbedding`: a frozen base weight plus a packed delta.

They are made from existing modules by changing the class in place, so names, hooks, ties and
whatever else points at the module stay valid; the base weight stays at `.weight`. The packed
factors are frozen integer parameters, `dm_v`, `dm_u`, `dm_ranks` and, on min-max grids, `dm_zeros`
(parameters, not buffers: transformers shards, offloads and saves parameters).
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaMixError
from ..ops.low_rank import cheapest, delta_linear, expand_linear, low_rank, low_rank_rows
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import PREFIX, GroupSizes, Runs, check_parts, part_names


def weight_of(module: nn.Module) -> Tensor:
    """`module.weight`, typed."""
    return cast(Tensor, module.weight)


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of `module` as the matrix [m outputs, n inputs], or that matrix as its weight.

    GPT-2's `Conv1D` and some experts keep the transpose.
    """
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return weight.T if transposed else weight


def matrix_of(module: nn.Module) -> Tensor:
    """`module.weight` as the matrix [m outputs, n inputs] that a delta is added to."""
    return oriented(module, weight_of(module))


def shape_of(module: nn.Module) -> tuple[int, int]:
    """[m, n] of a module's matrix: outputs and inputs."""
    m, n = matrix_of(module).shape
    return m, n


def declared_shape(module: nn.Module) -> tuple[int, int]:
    """`shape_of`, also where bitsandbytes keeps the weight in a form of its own."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return shape_of(module)


def tied_tensors(model: PreTrainedModel, name: str) -> list[str]:
    """The tensor's own name and those of the tensors tied to it."""
    ties = model.all_tied_weights_keys.items()
    return [name, *(target for target, source in ties if source == name)]


def tied_modules(model: PreTrainedModel, name: str) -> dict[str, nn.Module]:
    """The module itself and every module whose weight is tied to its weight, by name."""
    names = [tensor.removesuffix(".weight") for tensor in tied_tensors(model, f"{name}.weight")]
    return {n: model.get_submodule(n) for n in names}


class DeltaModule(nn.Module):
    """What both kinds share: the packed parameters and the way back to a dense weight."""

    dm_runs: Runs
    dm_group_sizes: GroupSizes
    dm_gaussian: bool
    dm_merged: Tensor | None  # a buffer that is not saved; see `merged.py`

    def delta_parameters(self) -> dict[str, Tensor]:
        names = part_names("", self.dm_gaussian)
        return {part: getattr(self, name) for part, name in names.items()}

    def packed(self) -> PackedDelta:
        m, n = shape_of(self)
        return PackedDelta(m, n, self.dm_group_sizes, self.dm_runs, **self.delta_parameters())

    def _op_arguments(self) -> tuple[Any, ...]:
        return self.packed().op_arguments

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W_base + Û·V̂, added in float32, in `dtype` (default: the base weight's)."""
        weight = weight_of(self)
        if hasattr(weight, "device_mesh"):
            raise DeltaMixError(
                "the weights are shared out among processes and cannot be merged with the delta; "
                "load the delta repo in one process for that"
            )
        delta = oriented(self, self.packed().dense().to(weight.device))
        return (weight.float() + delta).to(dtype or weight.dtype)


class DeltaLinear(DeltaModule, nn.Linear):
    """y = x·W_baseᵀ + bias + (x·V̂ᵀ)·Ûᵀ."""

    dm_siblings: Any = None  # a siblings.Siblings, if h is shared with other layers

    def forward(self, x: Tensor) -> Tensor:
        if self.dm_merged is not None:
            return F.linear(x, self.dm_merged, self.bias)
        packed = self._op_arguments()
        if torch.is_autocast_enabled(x.device.type):  # casts inside F.linear, not inside custom ops
            y = F.linear(x, self.weight, self.bias)
            return y + low_rank(x.to(y.dtype), *packed, transposed=False)
        *tensors, runs, _, _, group_sizes = packed
        if self.dm_siblings is not None and self.dm_siblings.usable(x):
            h, first = self.dm_siblings.down_project(self, x)
            return cheapest(expand_linear)(x, self.weight, self.bias, h, first, *tensors[:3], runs)
        linear = cheapest(delta_linear)
        return linear(x, self.weight, self.bias, *tensors, runs, group_sizes)


class DeltaConv1D(DeltaModule, Conv1D):
    """y = x·W_base + bias + (x·V̂ᵀ)·Ûᵀ: GPT-2's linear layer, whose weight is [n, m]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.dm_merged is not None:
            return x @ self.dm_merged + self.bias
        y: Tensor = Conv1D.forward(self, x)
        return y + cheapest(low_rank)(x.to(y.dtype), *self._op_arguments(), transposed=False)


class DeltaEmbedding(DeltaModule, nn.Embedding):
    """y = W_base[ids] + Û[ids]·V̂."""

    dm_first: int | None = None  # the first of this process's tokens, if several share them out

    def forward(self, ids: Tensor) -> Tensor:
        if self.dm_merged is not None:
            return F.embedding(ids, self.dm_merged)
        if self.dm_first is not None:
            return self._own_tokens(ids - self.dm_first)
        base = super().forward(ids)  # cooperates with subclasses such as scaled embeddings
        rows = cheapest(low_rank_rows)(ids.long(), *self._op_arguments())
        return base + rows.to(base.dtype)

    def _own_tokens(self, ids: Tensor) -> Tensor:
        """Zeros for the tokens of other processes: transformers adds them all up."""
        others = (ids < 0) | (ids >= len(self.weight))
        ids = ids.masked_fill(others, 0)
        rows = cheapest(low_rank_rows)(ids.long(), *self._op_arguments())
        y = F.embedding(ids, self.weight) + rows.to(self.weight.dtype)
        return y.masked_fill(others[..., None], 0)


_PLAIN = {DeltaLinear: nn.Linear, DeltaConv1D: Conv1D, DeltaEmbedding: nn.Embedding}


def delta_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The delta counterpart of a module class, or None if it cannot carry a packed delta.

    A subclass of `nn.Embedding` (Gemma scales its output, OPT shifts ids) keeps its own forward:
    the counterpart slips `DeltaEmbedding` between the two, where `super().forward` meets it.
    """
    if cls is nn.Linear:
        return DeltaLinear
    if cls is nn.Embedding:
        return DeltaEmbedding
    if cls is Conv1D:
        return DeltaConv1D
    if issubclass(cls, nn.Embedding) and not issubclass(cls, DeltaModule):
        if reads_weight_itself(cls):
            return None
        return type(cls.__name__, (cls, DeltaEmbedding), {"dm_plain_class": cls})
    return None


def reads_weight_itself(cls: type[nn.Embedding]) -> bool:
    """Whether a subclass's forward looks its rows up past `nn.Embedding.forward` (Whisper's)."""
    own = inspect.unwrap(cls.forward)
    return own is not nn.Embedding.forward and "__class__" not in own.__code__.co_freevars


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` an instance of `cls`, for accelerate's hooks too: they keep a forward."""
    object.__setattr__(module, "__class__", cls)
    if "_old_forward" in module.__dict__:
        object.__setattr__(module, "_old_forward", MethodType(cls.forward, module))


def attach(module: nn.Module, packed: PackedDelta) -> None:
    """Turn `module` into its delta counterpart; the tensors of `packed` may be meta.

    Raises:
        DeltaMixError: the module cannot carry a delta, or one of this shape.
    """
    plain = type(module)
    counterpart = delta_class(plain)
    if counterpart is None:
        raise DeltaMixError(f"a {plain.__name__} cannot carry a packed delta")
    check_parts(*shape_of(module), packed.runs, packed.group_sizes, packed.tensors)
    change_class(module, counterpart)
    assert isinstance(module, DeltaModule)
    module.dm_runs, module.dm_group_sizes = packed.runs, packed.group_sizes
    module.dm_gaussian = packed.gaussian
    for part, name in packed.names("").items():
        tensor = packed.tensors[part]
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(name, tensor)
    module.register_buffer("dm_merged", None, persistent=False)
    module.weight.requires_grad_(False)


def attach_with_ties(model: PreTrainedModel, name: str, packed: PackedDelta) -> None:
    """`attach` to the module `name` and to every module tied to its weight (lm_head, say).

    The twins share the very same parameters, and `model.all_tied_weights_keys` learns so: then
    transformers loads, offloads and saves one copy, as it does for the tied weight itself.
    """
    module = model.get_submodule(name)
    attach(module, packed)
    assert isinstance(module, DeltaModule)
    shared = module.packed()
    for target in tied_tensors(model, f"{name}.weight")[1:]:
        twin = target.removesuffix(".weight")
        attach(model.get_submodule(twin), shared)
        names = zip(shared.names(twin).values(), shared.names(name).values(), strict=True)
        model.all_tied_weights_keys.update(names)


def detach(module: DeltaModule) -> None:
    """The inverse of `attach`: drop the delta and restore the plain class (weight untouched)."""
    for name in part_names("", module.dm_gaussian).values():
        delattr(module, name)
    del module.dm_runs, module.dm_group_sizes, module.dm_gaussian, module.dm_merged
    module.__dict__.pop("dm_siblings", None)
    change_class(module, _PLAIN.get(type(module)) or cast(Any, module).dm_plain_class)


def untie_packed(model: PreTrainedModel) -> None:
    """Drop the ties between packed tensors that `attach_with_ties` noted."""
    ties = model.all_tied_weights_keys
    for name in [name for name in ties if name.rpartition(".")[2].startswith(PREFIX)]:
        del ties[name]


def delta_modules(model: nn.Module) -> dict[str, DeltaModule]:
    """Name -> module of everything that carries a packed delta, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DeltaModule)}


def packed_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name -> [m, n] of every packed matrix; tied twins are not listed again."""
    tied = model.all_tied_weights_keys
    modules = delta_modules(model).items()
    return {name: shape_of(module) for name, module in modules if f"{name}.weight" not in tied}
