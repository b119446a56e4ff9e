"""Fused experts: 3-D weights [experts, ...] with a packed delta for each expert.

transformers keeps the experts of a mixture in two parameters, `gate_up_proj` (or `up_proj`) and
`down_proj`, of a module with the experts interface (`use_experts_implementation`). Which modules
those are is seen by their structure. To the compressor every expert's slice is a matrix of its own,
named `<module>.<parameter>.<number>`; the finished slices of a parameter are joined and attached at
once. `DeltaExperts` is made from the module by changing its class, as `DeltaLinear` is; its packed
parameters are named `<parameter>_dm_v` and so on: a dotted name would be taken for the weight of an
expert by the patterns with which transformers fuses checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from ..ops.experts import add_delta, base_product, experts_forward
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import PREFIX, GroupSizes, part_names
from .layers import change_class, packed_shapes, shape_of

_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_EXPERT = re.compile(rf"(.+\.(?:{'|'.join(_NAMES)}))\.\d+")


def is_experts(module: nn.Module) -> bool:
    """Whether it has the experts interface of transformers, and so computes what we know."""
    plain: Any = getattr(module, "dm_plain_class", type(module))
    forward = getattr(plain.forward, "__code__", None)
    return (
        forward is not None
        and "experts_interface" in forward.co_freevars
        and len(fused_weights(module)) == 2
    )


def fused_weights(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters that such a module multiplies by."""
    own = module._parameters
    return [n for n in _NAMES if (weight := own.get(n)) is not None and weight.dim() == 3]


def slice_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """[m, n] of every expert's matrix in the parameter `name`."""
    m, n = weight_of(module, name).shape[1:]
    return (n, m) if module.is_transposed else (m, n)


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The 3-D parameter, typed."""
    return cast(Tensor, getattr(module, name))


class Expert(nn.Module):
    """One expert's slice of a 3-D parameter, as if it were a layer: what the compressor sees.

    `number` is the expert's, `fused` the parameter it belongs to.
    """

    def __init__(self, fused: FusedWeight, number: int):
        super().__init__()
        self.fused, self.number = fused, number
        self.is_transposed = fused.module.is_transposed

    @property
    def weight(self) -> Tensor:
        """The slice itself: writing to it changes the model."""
        return weight_of(self.fused.module, self.fused.leaf).detach()[self.number]


class FusedWeight:
    """A 3-D parameter while its experts are compressed, and what is packed of them so far."""

    def __init__(self, model: PreTrainedModel, name: str):
        owner, _, self.leaf = name.rpartition(".")
        self.name, self.module = name, model.get_submodule(owner)
        self.waiting: set[int] = set()
        self._packed: list[PackedDelta | None] = [None] * self.experts

    @property
    def experts(self) -> int:
        return len(weight_of(self.module, self.leaf))

    def expert(self, number: int) -> Expert:
        """A matrix to compress; `finish` must be called for each."""
        self.waiting.add(number)
        return Expert(self, number)

    def finish(self, number: int, packed: PackedDelta | None) -> None:
        """Take an expert's result; the last one attaches all, if any has ranks."""
        self._packed[number] = packed
        self.waiting.discard(number)
        if not self.waiting and any(self._packed):
            attach_experts(self.module, self.leaf, PackedDelta.join(self._packed))
            self._packed = []


class DeltaExperts(nn.Module):
    """Experts with frozen 3-D base weights and packed deltas.

    Merged weights (`merged.py`) are buffers `<parameter>_dm_merged` that are not saved.

    Attributes:
        dm_group_sizes: of every parameter with a delta, by its name.
    """

    dm_group_sizes: dict[str, GroupSizes]
    dm_gaussian: bool
    dm_plain_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, self._project)

    def _project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        merged = getattr(self, f"{name}_{PREFIX}merged", None)
        if merged is not None:
            return base_product(self, name, merged, x, ends)
        y = base_product(self, name, weight_of(self, name), x, ends)
        if name not in self.dm_group_sizes:
            return y
        return add_delta(y, self.packed(name), x, ends)

    def packed(self, name: str) -> PackedDelta:
        """The deltas of one 3-D parameter."""
        names = part_names(name, self.dm_gaussian, experts=True)
        own: Any = {part: getattr(self, attribute) for part, attribute in names.items()}
        return PackedDelta(*slice_shape(self, name), self.dm_group_sizes[name], [], **own)

    def frozen_weights(self) -> dict[str, Tensor]:
        """The base's 3-D weights that have a delta, by the parameter's name."""
        return {name: weight_of(self, name) for name in self.dm_group_sizes}

    def keep_merged(self) -> list[Tensor]:
        """Run by merged weights from now on; returns them."""
        made = {name: self.merged_weight(name) for name in self.dm_group_sizes}
        for name, merged in made.items():
            setattr(self, f"{name}_{PREFIX}merged", merged)
        return [*made.values()]

    def merge(self) -> None:
        """Take the deltas into the weights: a module like any other."""
        for name in self.dm_group_sizes:
            merged = nn.Parameter(self.merged_weight(name), requires_grad=False)
            setattr(self, name, merged)
        detach_experts(self)

    def drop_merged(self) -> None:
        """Undo `keep_merged`."""
        for name in self.dm_group_sizes:
            setattr(self, f"{name}_{PREFIX}merged", None)

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W_base + Û·V̂ of every expert, added in float32, in the base weight's dtype."""
        weight = weight_of(self, name)
        merged = weight.detach().clone()
        for number, packed in enumerate(self.packed(name).split()):
            if packed is not None:
                dense = packed.dense()
                dense = dense.mT if self.is_transposed else dense
                merged[number] = (weight[number].float() + dense.to(weight.device)).to(weight.dtype)
        return merged


@cache
def _delta_class(plain: Any) -> type[DeltaExperts]:
    return type(plain.__name__, (DeltaExperts, plain), {"dm_plain_class": plain})


def attach_experts(module: nn.Module, name: str, packed: PackedDelta) -> None:
    """Give a module with the experts interface the packed deltas of its parameter `name`.

    Raises:
        DeltaMixError: it has no such 3-D parameter.
    """
    if not isinstance(module, DeltaExperts):
        if not is_experts(module):
            raise DeltaMixError(f"a {type(module).__name__} cannot carry packed experts")
        plain: Any = type(module)
        change_class(module, _delta_class(plain))
        assert isinstance(module, DeltaExperts)
        module.dm_group_sizes = {}
    module.dm_group_sizes[name], module.dm_gaussian = packed.group_sizes, packed.gaussian
    for part, attribute in packed.names(name).items():
        frozen = nn.Parameter(packed.tensors[part], requires_grad=False)
        module.register_parameter(attribute, frozen)
    module.register_buffer(f"{name}_{PREFIX}merged", None, persistent=False)
    weight_of(module, name).requires_grad_(False)


def detach_experts(module: DeltaExperts) -> None:
    """The inverse of `attach_experts` for all parameters of a module (weights untouched)."""
    for name in module.dm_group_sizes:
        names = part_names(name, module.dm_gaussian, experts=True).values()
        for attribute in (*names, f"{name}_{PREFIX}merged"):
            delattr(module, attribute)
    plain = module.dm_plain_class
    del module.dm_group_sizes, module.dm_gaussian
    change_class(module, plain)


def delta_experts(model: nn.Module) -> dict[str, DeltaExperts]:
    """Name -> module of all experts that carry packed deltas, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DeltaExperts)}


def expert_place(model: nn.Module, name: str) -> tuple[nn.Module, str, int] | None:
    """Module, parameter and number of the expert's matrix `name`; None if it is none."""
    fused, _, number = name.rpartition(".")
    owner, _, leaf = fused.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if not is_experts(module) or leaf not in fused_weights(module) or not number.isdecimal():
        return None
    known = int(number) < len(weight_of(module, leaf)) and str(int(number)) == number
    return (module, leaf, int(number)) if known else None


def fused_name(name: str) -> str | None:
    """The 3-D parameter an expert's matrix belongs to, by its name alone; None for other names."""
    found = _EXPERT.fullmatch(name)
    return found[1] if found else None


def fused_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """3-D parameter -> its number of experts, of all experts' matrices among `names`."""
    places = {name: expert_place(model, name) for name in names if fused_name(name)}
    return {
        name.rpartition(".")[0]: len(weight_of(*place[:2]))
        for name, place in places.items()
        if place is not None
    }


def replace_expert(weights: dict[str, Tensor], model: nn.Module, name: str, matrix: Tensor) -> None:
    """Enter an expert's new matrix [m, n] in its whole parameter; nothing if it is no expert's."""
    if (place := expert_place(model, name)) is None:
        return
    module, leaf, number = place
    fused = name.rpartition(".")[0]
    if fused not in weights:
        weights[fused] = weight_of(module, leaf).detach().clone()
    weights[fused][number] = matrix.mT if module.is_transposed else matrix


def matrix_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """[m, n] of a layer's matrix or an expert's, by the name the compressor has for it."""
    place = expert_place(model, name)
    return shape_of(model.get_submodule(name)) if place is None else slice_shape(*place[:2])


def compressed_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name -> [m, n] of every matrix that differs from the base and is not stored whole.

    Those too that were not worth a rank.
    """
    found = packed_shapes(model)
    for name, module in delta_experts(model).items():
        for leaf in module.dm_group_sizes:
            experts = enumerate(module.packed(leaf).split())
            kept = [f"{name}.{leaf}.{number}" for number, packed in experts if packed]
            found |= dict.fromkeys(kept, slice_shape(module, leaf))
    dropped = model.config.quantization_config.dropped
    return found | {name: matrix_shape(model, name) for name in dropped}
