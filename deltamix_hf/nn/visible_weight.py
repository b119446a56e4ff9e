"""A layer's weight or bias as others see it: the fine-tune's, made when it is used.

Adapters, merging tools and losses read `layer.weight` and know nothing of deltas. What they get
answers for the base's parameter (shape, dtype, device), but computes with W_base + Û·V̂, or the bias
of the delta in use. Whoever writes to it, or wants to train it, makes the layer dense first.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Answered from the base's parameter: cheap, and asked in every forward pass (T5, Gemma).
_LOOKS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"}
_LOOKS |= {"is_contiguous", "is_floating_point", "is_complex", "__len__", "__hash__"}
# What shares memory with the weight: who writes to it writes to the weight.
_VIEWS = {"data", "detach", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"}
_VIEWS |= {"T", "mT", "H", "real", "t", "transpose", "swapaxes", "permute", "movedim", "expand"}
_VIEWS |= {"squeeze", "unsqueeze", "narrow", "select"}
_GRADIENTS = {"requires_grad", "requires_grad_", "grad"}
_MEMORY = {"data_ptr", "untyped_storage", "storage"}
_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_WRITES |= {"__setitem__"}
_alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by parameter: twins' are one


class VisibleWeight(Tensor):
    """Stands for `dm_leaf` of `dm_layer`, or a view of it; shares the memory of `dm_base`."""

    _is_param = True  # is a Parameter for `isinstance`
    dm_layer: Any
    dm_leaf: str  # "weight" or "bias"
    dm_base: Tensor  # the base's parameter, or the view of it
    dm_views: tuple[Any, ...]  # functions that make the view of the weight

    @classmethod
    def whole(cls, layer: Any, base: nn.Parameter, leaf: str = "weight") -> Tensor:
        """Return what others see of `layer`, one object while somebody has it."""
        seen = _alive.get(id(base))
        return _alive.setdefault(id(base), cls.of(layer, leaf, base)) if seen is None else seen

    @classmethod
    def settled(cls, base: nn.Parameter) -> nn.Parameter:
        """Return the parameter of a layer that is dense now: what others have seen, or `base`."""
        seen: Any = _alive.pop(id(base), base)
        if isinstance(seen, cls):
            for name in ("dm_layer", "dm_leaf", "dm_base", "dm_views"):
                del vars(seen)[name]
            object.__setattr__(seen, "__class__", nn.Parameter)
        return seen

    @classmethod
    def of(cls, layer: Any, leaf: str, base: Tensor, *views: Any) -> "VisibleWeight":
        """Make what others see of a layer's `leaf`, the parameter `base`, through `views`."""
        seen = base.detach().as_subclass(cls)
        vars(seen).update(vars(base), dm_layer=layer, dm_leaf=leaf, dm_base=base, dm_views=views)
        return seen

    def _in_use(self) -> Tensor:
        weight = self.dm_base
        if hasattr(self.dm_layer, "in_use"):  # else it is dense by now
            weight = self.dm_layer.in_use(self.dm_leaf)
            for view in self.dm_views:
                weight = view(weight)
        if self.requires_grad and torch.is_grad_enabled():  # a parameter made of it
            weight = weight + (self - self.detach())
        return weight

    def _written(self) -> Tensor:
        if hasattr(self.dm_layer, "become_dense"):
            self.dm_layer.become_dense()
        return self.dm_base if isinstance(self, VisibleWeight) else self  # a view, or settled

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        setting, getting = name == "__set__", name == "__get__"
        name = func.__self__.__name__ if setting or getting else name
        first: Any = args[0] if args and isinstance(args[0], cls) else None
        with torch._C.DisableTorchFunctionSubclass():
            if first is not None and name in _GRADIENTS:
                if isinstance(first.dm_base, nn.Parameter):  # the layer's, not made of it
                    wanted = name != "grad" and args[1:] not in ((), (False,))
                    its = first._written() if wanted else first.dm_base
                    return func(its, *args[1:], **kwargs)
                return func(*args, **kwargs)
            if name in _LOOKS or (getting and name not in _VIEWS):
                return func(*args, **kwargs)
            if first is not None and name in _MEMORY:  # of a copy that lives as long
                return func(vars(first).setdefault("dm_copy", first._in_use()))
            if setting or name in _WRITES or name[-1] == "_" != name[-2:-1]:
                # lists too, and `init`'s `tensor=`
                dense = _each(args[:1] or kwargs, cls._written)
                if not setting:
                    dense = _each(dense, Tensor.detach, Tensor)
                args, kwargs = (dense + args[1:], kwargs) if args else (args, dense)
            elif "out" in kwargs:
                kwargs = {**kwargs, "out": _each(kwargs["out"], cls._written)}
            elif first is not None and _is_view(name, args):

                def view(weight: Tensor) -> Any:
                    return func(weight, *args[1:], **kwargs)

                base = view(first.dm_base)
                return cls.of(first.dm_layer, first.dm_leaf, base, *first.dm_views, view)
            return func(*_each(args, cls._in_use), **_each(kwargs, cls._in_use))


def _is_view(name: str, args: tuple[Any, ...]) -> bool:
    if name == "__getitem__":  # by numbers and slices; tensors and lists take a copy
        index = args[1] if isinstance(args[1], tuple) else args[1:]
        return not any(isinstance(part, (Tensor, list)) for part in index)
    return name in _VIEWS


def _each(values: Any, fn: Any, cls: type = VisibleWeight) -> Any:
    return tree_map(lambda value: fn(value) if isinstance(value, cls) else value, values)
