"""`DeltaLinear` and `DeltaEmbedding`: a frozen base weight plus a packed delta.

They are made from existing modules by changing the class in place, so names, hooks, ties and
whatever else points at the module stay valid; the base weight stays at `.weight`. The packed
factors are four frozen integer parameters, `dm_v`, `dm_u`, `dm_ranks`, `dm_zeros`
(parameters, not buffers: transformers shards, offloads and saves parameters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DeltaMixError
from .ops import low_rank, low_rank_rows
from .packed import DTYPES, PARTS, PackedFactors, Runs, part_shapes

PREFIX = "dm_"


class _DeltaModule(nn.Module):
    """What both kinds share: the packed parameters and the way back to a dense weight."""

    dm_runs: Runs
    dm_group_size: int

    def delta_parameters(self) -> dict[str, nn.Parameter]:
        return {part: getattr(self, PREFIX + part) for part in PARTS}

    def packed(self) -> PackedFactors:
        m, n = self.weight.shape
        return PackedFactors(m, n, self.dm_group_size, self.dm_runs, **self.delta_parameters())

    def _layout(self) -> tuple[list[int], int, int, int]:
        flat = [number for run in self.dm_runs for number in run]
        return flat, *self.weight.shape, self.dm_group_size

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W_base + Û·V̂, added in float32, in `dtype` (default: the base weight's)."""
        dense = self.weight.float() + self.packed().dense().to(self.weight.device)
        return dense.to(dtype or self.weight.dtype)


class DeltaLinear(_DeltaModule, nn.Linear):
    """y = x·W_baseᵀ + bias + (x·V̂ᵀ)·Ûᵀ."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + low_rank(x, *self.delta_parameters().values(), *self._layout(), False)


class DeltaEmbedding(_DeltaModule, nn.Embedding):
    """y = W_base[ids] + Û[ids]·V̂."""

    def forward(self, ids: Tensor) -> Tensor:
        base = super().forward(ids)  # cooperates with subclasses such as scaled embeddings
        flat, m, n, group_size = self._layout()
        rows = low_rank_rows(ids, *self.delta_parameters().values(), flat, m, n, group_size)
        return base + rows.to(base.dtype)


def delta_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The delta counterpart of a module class, or None if it cannot carry a packed delta.

    A subclass of `nn.Embedding` (Gemma scales its output, OPT shifts ids) keeps its own forward: the
    counterpart slips `DeltaEmbedding` between the two, so that its `super().forward` meets the delta.
    """
    if cls is nn.Linear:
        return DeltaLinear
    if cls is nn.Embedding:
        return DeltaEmbedding
    if issubclass(cls, nn.Embedding) and not issubclass(cls, _DeltaModule):
        return type(cls.__name__, (cls, DeltaEmbedding), {"dm_plain_class": cls})
    return None


def attach(module: nn.Module, runs: Runs, group_size: int, tensors: dict[str, Tensor]) -> None:
    """Turn `module` into its delta counterpart holding `tensors` (meta placeholders are fine)."""
    m, n = module.weight.shape
    expected = part_shapes(m, n, runs, group_size)
    for part in PARTS:
        if tuple(tensors[part].shape) != expected[part] or tensors[part].dtype != DTYPES[part]:
            raise DeltaMixError(
                f"packed tensor {PREFIX}{part} is {tensors[part].dtype} {list(tensors[part].shape)}, "
                f"an [{m}, {n}] matrix with these widths needs {DTYPES[part]} {list(expected[part])}: "
                "the delta does not belong to this model, or the file is damaged"
            )
    plain = type(module)
    module.__class__ = delta_class(plain)
    module.dm_runs, module.dm_group_size = runs, group_size
    for part in PARTS:
        tensor = tensors[part]
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(PREFIX + part, tensor)
    module.weight.requires_grad_(False)


def attach_with_ties(
    model: nn.Module, name: str, runs: Runs, group_size: int, tensors: dict[str, Tensor]
) -> None:
    """`attach` to the module `name` and to every module tied to its weight (lm_head, say).

    The twins share the very same parameters, and `model.all_tied_weights_keys` learns so: then
    transformers loads, offloads and saves one copy, as it does for the tied weight itself.
    """
    weight = f"{name}.weight"
    attach(model.get_submodule(name), runs, group_size, tensors)
    shared = model.get_submodule(name).delta_parameters()
    for target in [t for t, source in model.all_tied_weights_keys.items() if source == weight]:
        twin = target.removesuffix(".weight")
        attach(model.get_submodule(twin), runs, group_size, shared)
        for part in PARTS:
            model.all_tied_weights_keys[f"{twin}.{PREFIX}{part}"] = f"{name}.{PREFIX}{part}"


def detach(module: nn.Module) -> None:
    """The inverse of `attach`: drop the delta and restore the plain class (weight untouched)."""
    for part in PARTS:
        delattr(module, PREFIX + part)
    del module.dm_runs, module.dm_group_size
    if isinstance(module, DeltaLinear):
        module.__class__ = nn.Linear
    else:
        module.__class__ = getattr(type(module), "dm_plain_class", nn.Embedding)


def delta_modules(model: nn.Module) -> dict[str, _DeltaModule]:
    """Name -> module of everything that carries a packed delta, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _DeltaModule)}
