"""Compile Triton kernels by the host code that launches them, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deltamix_kernels.config
import torch
from deltamix_kernels import Packed
from shapes import Linear, runs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


@contextmanager
def launches(capability: int = 90) -> Iterator[list[tuple[str, Any]]]:
    """Context manager: compile instead of launching; yields a list that grows by each launch.

    With the settings of a GPU that nobody tuned. Entries are (kernel's name, Triton's compiled
    kernel, grid). Tensors may be on "meta". The process cannot launch afterwards either.
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

    settings = deltamix_kernels.config
    read = settings.read
    settings.read = lambda _: read("default")  # type: ignore[assignment]
    settings.config.cache_clear()
    driver.set_active(Target())
    jit.JITFunction.run = warm
    try:
        yield found
    finally:
        jit.JITFunction.run = run
        settings.read = read
        settings.config.cache_clear()


def meta_packed(linear: Linear, layout: list[tuple[int, int, int]] | None = None) -> Packed:
    """The delta of a layer on "meta"; `layout`: its runs, else what 1/16 of its bytes gives."""
    some = tuple(layout or runs(linear))
    made = [
        torch.empty(
            sum(run[0] * run[side] for run in some), -(-length // 8),
            dtype=torch.uint8, device="meta",
        )
        for side, length in ((1, linear.n), (2, linear.m))
    ]  # fmt: skip
    ranks = torch.empty(sum(run[0] for run in some), 3, dtype=torch.int16, device="meta")
    return Packed(made[0], made[1], ranks, None, some, linear.m, linear.n, (0, 0))
