"""Layers of a base with zero, one or many packed deltas beside the frozen weight.

`DeltaLinear`, `DeltaConv1D` and `DeltaEmbedding` are made from existing modules by changing the
class in place, so names, hooks, ties and whatever else points at the module stay valid; the base's
parameter stays, and who reads `.weight` meets base + delta (`visible_weight.py`). The factors of a
layer's own delta are frozen integer parameters, `dm_v`, `dm_u`, `dm_ranks` and, on min-max grids,
`dm_zeros` (parameters, not buffers: transformers shards, offloads and saves parameters).
"""

import inspect
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaMixError
from ..ops.low_rank import delta_linear, low_rank, low_rank_rows
from ..ops.packed_op import cheapest
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import PREFIX, check_parts
from .delta_matrix import DeltaMatrix
from .delta_matrix import change_class as change_class
from .delta_matrix import detach as detach
from .delta_matrix import weight_of as weight_of
from .delta_module import DeltaModule, first_tensor, joined_class, oriented, own_deltas


def matrix_of(module: nn.Module) -> Tensor:
    """Return `module.weight` as the matrix [m outputs, n inputs] that a delta is added to."""
    return oriented(module, weight_of(module))


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return [m, n] of a module's matrix: outputs and inputs."""
    m, n = matrix_of(module).shape
    return m, n


def declared_shape(module: nn.Module) -> tuple[int, int]:
    """Return [m, n], also where bitsandbytes keeps the weight in a form of its own."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return shape_of(module)


def resizes(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *_: Any,
    **__: Any,
) -> bool:
    """Tell whether `resize_token_embeddings` with these arguments changes the number of rows."""
    rows, step = weight_of(model.get_input_embeddings()).shape[0], pad_to_multiple_of or 1
    return -(-(new_num_tokens or rows) // step) * step != rows


def tied_tensors(model: PreTrainedModel, name: str) -> list[str]:
    """List the tensor's own name and those of the tensors tied to it."""
    ties = model.all_tied_weights_keys.items()
    return [name, *(target for target, source in ties if source == name)]


def tied_modules(model: PreTrainedModel, name: str) -> dict[str, nn.Module]:
    """Return the module and every module whose weight is tied to its weight, by name."""
    names = [tensor.removesuffix(".weight") for tensor in tied_tensors(model, f"{name}.weight")]
    return {n: model.get_submodule(n) for n in names}


class DeltaLinear(DeltaMatrix, nn.Linear):
    """y = x·W_baseᵀ + bias + (x·V̂ᵀ)·Ûᵀ."""

    dm_plain_class = nn.Linear
    dm_shared_input: Any = None  # a `shared_input.SharedInput`, of this layer alone or of several

    def _is_opaque(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        group = self.dm_shared_input  # is one op for all its members
        named = self.dm_row_deltas is not None
        if not named and group is not None and group.kernel_for(self, *args, **kwargs):
            return False
        return super()._is_opaque(args, kwargs)

    def straight(self, x: Tensor) -> Tensor:
        if (merged := self.merged()) is not None:
            return F.linear(x, merged, weight_of(self, "bias"))
        if torch.is_autocast_enabled(x.device.type):  # casts inside F.linear, not inside custom ops
            return self.with_delta(self.packed(), None, x)
        group = self.dm_shared_input
        if group is not None and (kernel := group.kernel_for(self, x)):
            return group.output(self, x, kernel)
        return self.alone(x)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        if not is_linear(self.dm_plain_class):
            return super().plain(*args, **kwargs)
        return F.linear(first_tensor(args, kwargs), weight_of(self), weight_of(self, "bias"))

    def alone(self, x: Tensor) -> Tensor:
        """Return the output [..., m] for x [..., n] by an op of this layer's own."""
        return cheapest(delta_linear, x, weight_of(self), weight_of(self, "bias"), self.packed())

    def added(self, packed: PackedDelta, x: Tensor, dtype: torch.dtype) -> Tensor:
        return cheapest(low_rank, x.to(dtype), packed, False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.dm_shared_input is not None:
            self.dm_shared_input.forget()
        return super()._apply(fn, recurse)


class DeltaConv1D(DeltaMatrix, Conv1D):
    """y = x·W_base + bias + (x·V̂ᵀ)·Ûᵀ: GPT-2's linear layer, whose weight is [n, m]."""

    dm_plain_class = Conv1D
    added = DeltaLinear.added

    def straight(self, x: Tensor) -> Any:
        merged = self.merged()
        return super().straight(x) if merged is None else x @ merged + weight_of(self, "bias")

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        y = torch.addmm(weight_of(self, "bias"), x.reshape(-1, x.shape[-1]), weight_of(self))
        return y.view(*x.shape[:-1], self.nf)


class DeltaEmbedding(DeltaMatrix, nn.Embedding):
    """y = W_base[ids] + Û[ids]·V̂; a subclass's own forward (Gemma scales) is done to both."""

    dm_plain_class = nn.Embedding
    dm_first: int | None = None  # the first of this process's tokens, if several share them out

    def straight(self, ids: Tensor) -> Any:
        if (merged := self.merged()) is not None:
            return F.embedding(ids, merged)
        if self.dm_first is None:
            return super().straight(ids)
        own = ids - self.dm_first  # transformers adds up all processes' rows: others count 0
        others = (own < 0) | (own >= len(weight_of(self)))
        y = super().straight(own.masked_fill(others, 0))
        return y.masked_fill(others[..., None], 0)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        how = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        return F.embedding(first_tensor(args, kwargs), weight_of(self), *how)

    def added(self, packed: PackedDelta, x: Tensor, dtype: torch.dtype) -> Tensor:
        return cheapest(low_rank_rows, x.long(), packed, dtype)


_CLASSES: dict[type[nn.Module], type[DeltaModule]] = {
    nn.Linear: DeltaLinear,
    Conv1D: DeltaConv1D,
    nn.Embedding: DeltaEmbedding,
}


@cache
def is_linear(cls: Any) -> bool:
    """Tell whether it is `nn.Linear` or a subclass, made like it, with its product (Falcon's)."""
    if cls is nn.Linear or not issubclass(cls, nn.Linear):
        return cls is nn.Linear
    if cls.__init__ is not nn.Linear.__init__ or hasattr(cls, "weight"):  # made in another way
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        layer, x = cls(3, 2, dtype=torch.float32), torch.randn(4, 3)
        try:
            return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))
        except Exception:  # it takes something else
            return False


def delta_class(cls: type[nn.Module]) -> type[DeltaModule] | None:
    """Return the delta counterpart of a module class, None if it cannot carry a packed delta.

    A subclass of `nn.Embedding` (Gemma scales its output, OPT shifts ids) keeps its own forward:
    the counterpart slips `DeltaEmbedding` between the two, where `super().forward` meets it.
    """
    if cls in _CLASSES or issubclass(cls, DeltaModule):
        return _CLASSES.get(cls)
    plain: Any = cls
    if is_linear(plain):
        return joined_class(cls, (DeltaLinear, cls))
    if not issubclass(cls, nn.Embedding):
        return None
    own = inspect.unwrap(cls.forward)
    if own is not nn.Embedding.forward and "__class__" not in own.__code__.co_freevars:
        return None  # it looks its rows up past `nn.Embedding.forward` (Whisper's)
    return joined_class(cls, (cls, DeltaEmbedding))


def routable_class(cls: type[nn.Module]) -> type[DeltaModule]:
    """Return the counterpart of any layer that takes named deltas.

    One that cannot carry a packed delta takes other tensors in place of its own; a quantized
    linear layer makes the base's product in its own way; a parametrized one makes its weight.
    """
    made = isinstance(getattr(cls, "weight", None), property)
    base = DeltaLinear if issubclass(cls, nn.Linear) and not made else DeltaModule
    return delta_class(cls) or joined_class(cls, (base, cls))


def attach(module: nn.Module, packed: PackedDelta) -> None:
    """Turn `module` into its delta counterpart; the tensors of `packed` may be meta.

    Raises DeltaMixError if the module cannot carry a delta, or one of this shape.
    """
    plain = type(module)
    counterpart = delta_class(plain)
    if counterpart is None:
        raise DeltaMixError(f"a {plain.__name__} cannot carry a packed delta")
    check_parts(*shape_of(module), packed.runs, packed.group_sizes, packed.tensors)
    change_class(module, counterpart)
    cast(DeltaModule, module).hold(packed)


def attach_with_ties(model: PreTrainedModel, name: str, packed: PackedDelta) -> None:
    """Attach a delta to the module `name` and all modules tied to its weight (lm_head, say).

    The twins share the very same parameters, and `model.all_tied_weights_keys` learns so: then
    transformers loads, offloads and saves one copy, as it does for the tied weight itself. Raises
    DeltaMixError as `attach` does.
    """
    module = model.get_submodule(name)
    attach(module, packed)
    shared = cast(DeltaModule, module).packed()
    twins = vars(module)["dm_twins"] = [module]
    for target in tied_tensors(model, f"{name}.weight")[1:]:
        twin = target.removesuffix(".weight")
        attach(other := model.get_submodule(twin), shared)
        twins.append(other)
        vars(other)["dm_twins"] = twins
        names = zip(shared.names(twin).values(), shared.names(name).values(), strict=True)
        model.all_tied_weights_keys.update(names)


def detach_all(model: PreTrainedModel) -> None:
    """Drop the own deltas of all layers, and the ties that `attach_with_ties` noted."""
    for module in own_deltas(model).values():
        detach(module)
    ties = model.all_tied_weights_keys
    for name in [name for name in ties if name.rpartition(".")[2].startswith(PREFIX)]:
        del ties[name]


def delta_modules(model: nn.Module) -> dict[str, DeltaModule]:
    """Return `own_deltas` without experts."""
    return {name: m for name, m in own_deltas(model).items() if "weight" in m.dm_own}


def packed_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return [m, n] of every packed matrix by name; tied twins are not listed again."""
    tied = model.all_tied_weights_keys
    modules = delta_modules(model).items()
    return {name: shape_of(module) for name, module in modules if f"{name}.weight" not in tied}
