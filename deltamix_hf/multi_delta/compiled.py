"""Layers with named deltas under `torch.compile`: one opaque op each.

The compiler sees the op's input, the module's number and the shape that comes out. Which deltas
there are and which rows take them is looked up while the compiled code runs, so nothing it could
guard on changes when deltas do.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import DeltaMixError

_modules: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def register(module: nn.Module) -> int:
    """Return the number under which the op finds a module."""
    number = next(_numbers)
    _modules[number] = module
    return number


def opaque(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the module's output as one node of a compiled graph.

    Raises:
        DeltaMixError: gradients are on, or the module takes more than one tensor.
    """
    values = [value for value in (*args, *kwargs.values()) if value is not None]
    if torch.is_grad_enabled():
        raise DeltaMixError("a compiled model with deltas gives no gradients: use torch.no_grad()")
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise DeltaMixError(
            f"a {module.dm_plain_class.__name__} with deltas takes more than one tensor and "
            "cannot be compiled"
        )
    return routed(values[0], module.dm_row_deltas.number)


@torch.library.custom_op("deltamix::routed", mutates_args=())
def routed(x: Tensor, number: int) -> Tensor:
    """Return what module `number` makes of x, by the route in force; contiguous."""
    module = _modules[number]
    deltas = module.dm_row_deltas
    router = deltas.router
    route = router.route
    fits = x.dim() > 0 and x.shape[0] % len(route.rows) == 0  # rows repeated since they were named
    with router.using(route.of_batch(x.shape[0]) if fits else route):
        y = deltas.run(module, (x,), {})
    if y.shape[:1] != x.shape[:1]:
        raise DeltaMixError(
            f"a {module.dm_plain_class.__name__} sees one row for the whole batch, which a "
            "compiled model cannot give different deltas: pass one for each row (position_ids)"
        )
    return y.contiguous()


@routed.register_fake
def _(x: Tensor, number: int) -> Tensor:
    module = _modules[number]
    tensors = {**module._parameters, **module._buffers}
    like = {key: _fake(t, x) for key, t in tensors.items() if t is not None}
    try:
        y = module.with_tensors(like).plain((x,), {})
        return x.new_empty(y.shape, dtype=y.dtype)
    except Exception as error:
        raise DeltaMixError(
            f"a {module.dm_plain_class.__name__} with deltas cannot be compiled: the shape of its "
            f"output is unknown ({error})"
        ) from error


def _fake(tensor: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(tensor.shape, dtype=tensor.dtype)
