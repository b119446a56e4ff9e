"""A bounds check in Triton's interpreter: live loads and stores lie inside tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class Checked:
    """Stands in for the interpreter's memory; addresses must lie in what was passed to the kernel.

    Attributes:
        accesses: how many loads and stores were checked.
    """

    def __init__(self, memory: Any, extra: tuple[torch.Tensor, ...]):
        self.memory, self.extra, self.accesses = memory, extra, 0
        self.passed: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(addresses, mask, np.dtype(dtype).itemsize, "load")
        return self.memory.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._check(addresses, mask, np.asarray(value).dtype.itemsize, "store")
        return self.memory.store(addresses, value, mask)

    def _check(self, addresses: Any, mask: Any, size: int, what: str) -> None:
        live = np.ravel(addresses)[np.ravel(mask).astype(bool)].astype(np.int64)
        inside = np.zeros(live.shape, bool)
        for tensor in (*self.passed, *self.extra):
            begin, rows = tensor.data_ptr(), tensor.untyped_storage()
            end = rows.data_ptr() + rows.nbytes()
            inside |= (live >= begin) & (live + size <= end)
        assert inside.all(), f"{what} of {size} bytes outside every tensor: {live[~inside][:3]}"
        self.accesses += len(live)


@contextmanager
def bounds_checked(*extra: torch.Tensor) -> Iterator[Checked]:
    """Context manager: check every access; `extra`: tensors that a kernel finds by address."""
    prepare = interpreter.GridExecutor._init_args_hst
    with pytest.MonkeyPatch.context() as patch:
        checked = Checked(interpreter._interpreter, extra)

        def prepared(self: Any, args: Any, kwargs: Any) -> Any:
            found = prepare(self, args, kwargs)
            checked.passed = [t for t in found[0] if isinstance(t, torch.Tensor)]
            return found

        patch.setattr(interpreter.GridExecutor, "_init_args_hst", prepared)
        patch.setattr(interpreter, "_interpreter", checked)
        yield checked
