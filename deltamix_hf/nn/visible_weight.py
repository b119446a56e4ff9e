"""The weight of a layer with a delta as others see it: the fine-tune's, made when it is used.

Adapters, merging tools and losses read `layer.weight` and know nothing of deltas. What they get
answers for the base's parameter (shape, dtype, device), but computes with W_base + Û·V̂. Whoever
writes to it, or wants to train it, makes the layer dense first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import DeltaMixError

# Asked of the base's parameter: cheap, and asked in every forward pass (T5, Gemma).
_LOOKS = {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous"}
_LOOKS |= {"ndimension", "nelement", "is_complex", "get_device", "__len__", "__hash__"}
_VALUES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are not
_MEMORY = {"data_ptr", "untyped_storage", "storage"}
_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_WRITES |= {"__setitem__"}


class VisibleWeight(Tensor):
    """Stands for the weight of `dm_layer`; shares the memory of the base's parameter `dm_base`."""

    _is_param = True  # is a Parameter for `isinstance`
    dm_layer: Any
    dm_base: Tensor

    @classmethod
    def of(cls, layer: Any, base: Tensor) -> "VisibleWeight":
        """Make what others see of `layer`, whose parameter is `base`."""
        seen = base.detach().as_subclass(cls)
        vars(seen).update(vars(base), dm_layer=layer, dm_base=base)
        return seen

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        attribute = name in ("__get__", "__set__")
        setting, name = name == "__set__", func.__self__.__name__ if attribute else name
        with torch._C.DisableTorchFunctionSubclass():
            if not setting and name in ("data", "detach"):
                return cls.of(args[0].dm_layer, args[0].dm_base)
            if name in ("requires_grad", "requires_grad_") and args[1:] == (False,):
                looks = True
            else:
                looks = name in _LOOKS or attribute and not setting and name not in _VALUES
            if name in _MEMORY:
                raise DeltaMixError(
                    "a weight with a delta has no memory of its own to hand out: take a copy with "
                    "weight.clone(), or call model.dequantize() first"
                )
            writes = setting or name in _WRITES or name[-1] == "_" != name[-2:-1]
            if writes and not looks and isinstance(args[0], cls):
                dense = args[0].dm_base
                if hasattr(args[0].dm_layer, "become_dense"):  # not so already
                    args[0].dm_layer.become_dense()
                args = (dense if setting or name == "requires_grad_" else dense.data, *args[1:])

            def replaced(value: Any) -> Any:
                if not isinstance(value, cls):
                    return value
                dense = looks or not hasattr(value.dm_layer, "weight_in_use")
                return value.dm_base if dense else value.dm_layer.weight_in_use()

            return func(*tree_map(replaced, args), **tree_map(replaced, kwargs))
