"""Compile Triton kernels by the host code that launches them, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


@contextmanager
def launches(capability: int = 90) -> Iterator[list[tuple[str, Any]]]:
    """Context manager: compile instead of launching; yields a list that grows by each launch.

    Entries are (kernel's name, Triton's compiled kernel, grid). Tensors may be on "meta". The
    process cannot launch afterwards either.
    """

    class Target:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    found: list[tuple[str, Any, tuple[int, ...]]] = []
    run = jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel, tuple(grid)))
        return kernel

    driver.set_active(Target())
    jit.JITFunction.run = warm
    try:
        yield found
    finally:
        jit.JITFunction.run = run
