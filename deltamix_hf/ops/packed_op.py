"""Torch custom ops that take a `PackedDelta`, which torch is handed as tensors and numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..quantization.packed_delta import PackedDelta

_PARTS = (
    "Tensor v, Tensor u, Tensor ranks, Tensor? zeros, {}, SymInt m, SymInt n, SymInt[] group_sizes"
)
PACKED, EXPERTS = _PARTS.format("SymInt[] runs"), _PARTS.format("Tensor counts")
_COUNT = _PARTS.count(",") + 1


def packed_op(name: str, *arguments: str) -> Callable[[Any], Any]:
    """Decorator: make a custom op of a function, which is then its `plain`.

    `arguments` are those of the op's schema in turn, `PACKED` or `EXPERTS` for a `PackedDelta`.
    """
    start = next(i for i, argument in enumerate(arguments) if argument in (PACKED, EXPERTS))
    stop = start + _COUNT
    schema = f"({', '.join(arguments)}) -> Tensor"

    def decorated(plain: Any) -> Any:
        def run(*args: Any) -> Tensor:
            return plain(*args[:start], PackedDelta.of_op(*args[start:stop]), *args[stop:])

        op: Any = torch.library.custom_op(f"deltamix::{name}", run, mutates_args=(), schema=schema)
        op.plain = plain
        return op

    return decorated


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Tell one content of a tensor from another: its address, and how often it was changed."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def cheapest(op: Any, *args: Any) -> Tensor:
    """Call an op with a `PackedDelta` among its arguments, or where that will do, its `plain`.

    Dispatching a custom op takes 0.1 ms, a third of all that a small layer's delta takes on a CPU:
    only autograd and compilers must see it.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return op.plain(*args)
    each = (arg.op_arguments if isinstance(arg, PackedDelta) else (arg,) for arg in args)
    return op(*[part for parts in each for part in parts])
