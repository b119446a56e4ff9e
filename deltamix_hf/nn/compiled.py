"""Layers with deltas under `torch.compile`: opaque ops that find the layer by a number.

The compiler sees the op's input, the number and the shape that comes out. Which deltas there are,
which rows take them, and how their products are launched is looked up while the compiled code runs,
so nothing it could guard on changes when deltas do. Without gradients only.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import DeltaMixError

_numbered: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def register(layer: Any) -> int:
    """Return a new number under which the ops find a module or a group of them."""
    number = next(_numbers)
    _numbered[number] = layer
    return number


def opaque(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the module's output as one node of a compiled graph.

    Raises DeltaMixError if gradients are on, or the module takes more than one tensor.
    """
    values = [value for value in (*args, *kwargs.values()) if value is not None]
    if torch.is_grad_enabled():
        raise DeltaMixError("a compiled model with deltas gives no gradients: use torch.no_grad()")
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise DeltaMixError(
            f"a {module.dm_plain_class.__name__} with deltas takes more than one tensor and "
            "cannot be compiled"
        )
    return layer(values[0], module.dm_number)


@torch.library.custom_op("deltamix::layer", mutates_args=())
def layer(x: Tensor, number: int) -> Tensor:
    """Return what module `number` makes of x, contiguous."""
    y: Tensor = _numbered[number].run_compiled(x)
    return y.clone() if y is x else y.contiguous()


@layer.register_fake
def _(x: Tensor, number: int) -> Tensor:
    module = _numbered[number]
    tensors = {**module._parameters, **module._buffers}
    like = {k: x.new_empty(t.shape, dtype=t.dtype) for k, t in tensors.items() if t is not None}
    try:
        y = module.with_tensors(like).plain(x)
        return x.new_empty(y.shape, dtype=y.dtype)
    except Exception as error:
        raise DeltaMixError(
            f"a {module.dm_plain_class.__name__} with deltas cannot be compiled: the shape of its "
            f"output is unknown ({error})"
        ) from error


@torch.library.custom_op("deltamix::weight", mutates_args=())
def weight(base: Tensor, number: int) -> Tensor:
    """Return the weight by which module `number` multiplies, a copy; like `base`."""
    return _numbered[number].in_use().clone()


@weight.register_fake
def _(base: Tensor, number: int) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("deltamix::layers_of_one_input", mutates_args=())
def layers_of_one_input(x: Tensor, number: int) -> list[Tensor]:
    """Return what the members of group `number` make of x [..., n]: [..., m] each."""
    return _numbered[number].products(x)


@layers_of_one_input.register_fake
def _(x: Tensor, number: int) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], m) for m in _numbered[number].lengths]
