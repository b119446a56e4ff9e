"""What all layers with deltas share: zero, one or many of them beside the base's frozen weights."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaMixError
from ..ops.dispatch import TRITON, choose
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import PREFIX, GroupSizes, Runs
from . import compiled


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of `module` as the matrix [m outputs, n inputs], or that as its weight.

    GPT-2's `Conv1D` and some experts keep the transpose.
    """
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return weight.T if transposed else weight


class OwnDelta(NamedTuple):
    """All of a layer's own `PackedDelta` but its tensors: `names` has their parameters by part."""

    m: int
    n: int
    group_sizes: GroupSizes
    runs: Runs
    names: dict[str, str]


class DeltaModule(nn.Module):
    """A layer of the base with deltas beside it: one of its own, or many by name.

    Its own delta consists of parameters, so that transformers loads, shards and saves it.
    """

    dm_plain_class: Any  # the class it was made from, whose forward makes the base's output
    dm_own: dict[str, OwnDelta]  # its own delta by the name of `weight` or of a 3-D parameter
    # `multi_delta.layers.RoutedDeltas`, which says which rows take which; None: all take its own
    dm_row_deltas: Any = None
    dm_number: int  # under which compiled code finds the module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and self._is_opaque(args, kwargs):
            return compiled.opaque(self, args, kwargs)
        if self.dm_row_deltas is not None:
            return self.dm_row_deltas.run(self, args, kwargs)
        return self.straight(*args, **kwargs)

    def _is_opaque(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether compilers must not look into it: its kernels look up what there is, and how.

        With gradients, and on a CPU, what they see are the ops of `ops/low_rank.py`.
        """
        if self.dm_row_deltas is not None:
            return True
        device = first_tensor(args, kwargs).device
        plain = len(args) == 1 and not kwargs and not torch.is_grad_enabled()
        return plain and choose(device) == TRITON and not torch.is_autocast_enabled(device.type)

    def run_compiled(self, x: Tensor) -> Tensor:
        """Return the output for x, called by compiled code."""
        deltas = self.dm_row_deltas
        return self.straight(x) if deltas is None else deltas.run_compiled(self, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["dm_number"] = compiled.register(self)  # a copy is another module

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(vars(self), memo))
        return made

    def straight(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output with the layer's own delta for all rows."""
        return self.with_delta(self.packed(), None, *args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output without a delta."""
        return self.dm_plain_class.forward(self, *args, **kwargs)

    def with_delta(self, packed: Any, base: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the output with a `PackedDelta`, or None; `base`: the plain output if known."""
        y = self.plain(*args, **kwargs) if base is None else base
        return y if packed is None else y + self.added(packed, first_tensor(args, kwargs), y.dtype)

    def added(self, packed: PackedDelta, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what a packed delta adds to the output for x, in `dtype`."""
        raise NotImplementedError

    def with_tensors(self, tensors: dict[str, Tensor]) -> Any:
        """Return this module with other parameters and buffers; it shares everything else."""
        if not tensors:
            return self
        shadow = type(self).__new__(type(self))
        vars(shadow).update(vars(self))
        for kind in ("_parameters", "_buffers"):
            own = {key: tensors.get(key, value) for key, value in getattr(self, kind).items()}
            shadow.__dict__[kind] = own
        return shadow

    def hold(self, packed: PackedDelta, leaf: str = "weight") -> None:
        """Make `packed`, whose tensors may be meta, the layer's own delta of one weight."""
        names = packed.names("" if leaf == "weight" else leaf)
        own = OwnDelta(packed.m, packed.n, packed.group_sizes, packed.runs, names)
        self.__dict__.setdefault("dm_own", {})[leaf] = own
        self.__dict__["dm_number"] = compiled.register(self)
        for part, tensor in packed.tensors.items():
            parameter: Any = tensor
            if not isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(names[part], parameter)
        self._parameters[leaf].requires_grad_(False)  # type: ignore[union-attr]

    def packed(self, leaf: str = "weight") -> PackedDelta:
        """Return the layer's own delta of one weight."""
        m, n, group_sizes, runs, names = self.dm_own[leaf]
        tensors: Any = {part: getattr(self, name) for part, name in names.items()}
        return PackedDelta(m, n, group_sizes, runs, **tensors)

    def merged(self, leaf: str = "weight") -> Tensor | None:
        """Return the merged weight that `merging.cache_merged` keeps, if it does."""
        return self._buffers.get(merged_name(leaf))

    def delta_parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the layer's own delta by name."""
        return {n: getattr(self, n) for own in self.dm_own.values() for n in own.names.values()}

    @torch.no_grad()
    def merged_weight(self, leaf: str = "weight", other: Any = None) -> Tensor:
        """Return W_base + Û·V̂, added in float32, in the base weight's dtype.

        Û·V̂ is the layer's own delta, or `other`. Raises DeltaMixError if several processes share
        the weight.
        """
        weight: Any = self._parameters[leaf]
        if hasattr(weight, "device_mesh"):
            raise DeltaMixError(
                "the weights are shared out among processes and cannot be merged with the delta; "
                "load the delta repo in one process for that"
            )
        merged = weight.detach().clone()
        both = (t if t.dim() == 3 else t[None] for t in (merged, weight))  # a matrix is one expert
        for target, base, packed in zip(*both, (other or self.packed(leaf)).split(), strict=True):
            if packed is not None:
                target.copy_(base.float() + oriented(self, packed.dense().to(weight.device)))
        return merged

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return super().requires_grad_(check_frozen(self, requires_grad))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.dm_row_deltas is not None:
            self.dm_row_deltas.check_loaded(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.dm_row_deltas is not None:
            self.dm_row_deltas.moved(self, fn)
        return self


def joined_class(plain: type[nn.Module], bases: tuple[type, ...]) -> Any:
    """Return the counterpart of a class: a class of its name with these bases, made once."""
    if bases not in _joined:
        own = {"dm_plain_class": plain}
        _joined[bases] = made_class(plain, bases, own, (joined_class, plain, bases))
    return _joined[bases]


_joined: dict[Any, Any] = {}


def made_class(plain: Any, bases: tuple[type, ...], own: dict[str, Any], recipe: Any) -> Any:
    """Make a class of the name of `plain`, whose instances can be pickled and copied.

    `recipe` is a function that makes it again, and its arguments, which may be such classes too.
    """
    own |= {"__module__": plain.__module__, "__reduce_ex__": _reduced, "dm_recipe": recipe}
    return type(plain.__name__, bases, own)


class _Recipe:
    """Pickled in place of a class that no module has by name, which is made of it again."""

    def __init__(self, cls: Any):
        self.cls = cls

    def __reduce__(self) -> Any:
        make, *args = self.cls.dm_recipe
        return make, tree_map(_recipe, tuple(args))


def _recipe(value: Any) -> Any:
    return _Recipe(value) if isinstance(value, type) and "dm_recipe" in vars(value) else value


def _reduced(self: Any, protocol: Any) -> Any:
    return _instance, (_recipe(type(self)),), *object.__reduce_ex__(self, 2)[2:]


def _instance(cls: Any) -> Any:
    return cls.__new__(cls)


def check_frozen(module: nn.Module, requires_grad: bool) -> bool:
    """Return `requires_grad`; DeltaMixError if true for a module with packed factors."""
    if requires_grad and own_deltas(module):
        raise DeltaMixError(
            "packed factors cannot be trained: train an adapter on top (peft), or call "
            "model.dequantize() first"
        )
    return requires_grad


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first tensor among a call's arguments, None if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def merged_name(leaf: str) -> str:
    """Return the name of the buffer, not saved, for the merged weight of `leaf`."""
    return f"{PREFIX}merged" if leaf == "weight" else f"{leaf}_{PREFIX}merged"


def own_deltas(model: nn.Module) -> dict[str, DeltaModule]:
    """Return all modules with a delta of their own by name, in the model's order."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, DeltaModule) and "dm_own" in m.__dict__}
