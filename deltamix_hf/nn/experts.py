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
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from ..ops.experts import add_delta, base_product, experts_forward
from ..quantization.packed_delta import PackedDelta
from .delta_module import DeltaModule, joined_class, own_deltas
from .layers import change_class, packed_shapes, shape_of, weight_of

_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_EXPERT = re.compile(rf"(.+\.(?:{'|'.join(_NAMES)}))\.\d+")


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module has the experts interface of transformers, whose product we know."""
    plain: Any = getattr(module, "dm_plain_class", type(module))
    free = getattr(getattr(plain.forward, "__code__", None), "co_freevars", ())
    return "experts_interface" in free and len(fused_weights(module)) == 2


def fused_weights(module: nn.Module) -> list[str]:
    """List the 3-D parameters that such a module multiplies by."""
    own = module._parameters
    return [n for n in _NAMES if (weight := own.get(n)) is not None and weight.dim() == 3]


def slice_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return [m, n] of every expert's matrix in the parameter `name`."""
    m, n = weight_of(module, name).shape[1:]
    return (n, m) if module.is_transposed else (m, n)


class Expert(nn.Module):
    """One expert's slice of a 3-D parameter, as if it were a layer: what the compressor sees."""

    def __init__(self, fused: FusedWeight, number: int):
        super().__init__()
        self.fused, self.number = fused, number
        self.is_transposed = fused.module.is_transposed

    @property
    def weight(self) -> Tensor:
        """Return the slice itself, [m, n] or its transpose: writing to it changes the model."""
        return weight_of(self.fused.module, self.fused.leaf).detach()[self.number]


class FusedWeight:
    """A 3-D parameter while its experts are compressed, and what is packed of them so far."""

    def __init__(self, model: PreTrainedModel, name: str):
        owner, _, self.leaf = name.rpartition(".")
        self.name, self.module = name, model.get_submodule(owner)
        self.waiting: set[int] = set()
        self.experts = len(weight_of(self.module, self.leaf))
        self._packed: list[PackedDelta | None] = [None] * self.experts

    def expert(self, number: int) -> Expert:
        """Return a matrix to compress; `finish` must be called for each."""
        self.waiting.add(number)
        return Expert(self, number)

    def finish(self, number: int, packed: PackedDelta | None) -> None:
        """Take an expert's result; the last one attaches all, if any has ranks."""
        self._packed[number] = packed
        self.waiting.discard(number)
        if not self.waiting and any(self._packed):
            attach_experts(self.module, self.leaf, PackedDelta.join(self._packed))
            self._packed = []


class DeltaExperts(DeltaModule):
    """Experts with frozen 3-D base weights; their deltas are `PackedDelta`s by 3-D parameter."""

    def straight(self, *args: Any, **kwargs: Any) -> Tensor:
        own = {leaf: self.packed(leaf) for leaf in self.dm_own}
        return self.with_delta(own, None, *args, **kwargs)

    def with_delta(self, packed: Any, base: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        deltas = packed or {}

        def project(leaf: str, x: Tensor, ends: Tensor) -> Tensor:
            merged = self.merged(leaf)
            if merged is not None:
                return base_product(self, leaf, merged, x, ends)
            y = base_product(self, leaf, weight_of(self, leaf), x, ends)
            return add_delta(y, deltas[leaf], x, ends) if leaf in deltas else y

        forward: Any = partial(experts_forward, self, project=project)
        return forward(*args, **kwargs)


def attach_experts(module: nn.Module, name: str, packed: PackedDelta) -> None:
    """Give a module with the experts interface the packed deltas of its parameter `name`.

    Raises DeltaMixError if the module has not that interface.
    """
    if not isinstance(module, DeltaExperts):
        if not is_experts(module):
            raise DeltaMixError(f"a {type(module).__name__} cannot carry packed experts")
        change_class(module, joined_class(type(module), (DeltaExperts, type(module))))
    cast(DeltaExperts, module).hold(packed, name)


def expert_place(model: nn.Module, name: str) -> tuple[nn.Module, str, int] | None:
    """Find module, parameter and number of the expert's matrix `name`; None if it is none."""
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
    """Return the 3-D parameter of an expert's matrix by its name alone; None for other names."""
    found = _EXPERT.fullmatch(name)
    return found[1] if found else None


def fused_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Count the experts of every 3-D parameter that has a matrix among `names`."""
    sizes = {}
    for name in filter(fused_name, names):
        if (place := expert_place(model, name)) is not None:
            sizes[name.rpartition(".")[0]] = len(weight_of(*place[:2]))
    return sizes


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
    """Return [m, n] of a layer's matrix or an expert's, by the compressor's name for it."""
    place = expert_place(model, name)
    return shape_of(model.get_submodule(name)) if place is None else slice_shape(*place[:2])


def compressed_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return [m, n] of every matrix that differs from the base and is not stored whole, by name.

    Those too that were not worth a rank.
    """
    found = packed_shapes(model)
    for name, module in own_deltas(model).items():
        for leaf in [leaf for leaf in module.dm_own if leaf != "weight"]:
            experts = enumerate(module.packed(leaf).split())
            kept = [f"{name}.{leaf}.{number}" for number, packed in experts if packed]
            found |= dict.fromkeys(kept, slice_shape(module, leaf))
    dropped = model.config.quantization_config.dropped
    return found | {name: matrix_shape(model, name) for name in dropped}
