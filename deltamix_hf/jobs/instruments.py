"""Measure a long run's seconds by stage, and keep its memory down.

Every moment belongs to the innermost stage that runs. Memory that was freed goes back to the system
where the allocator does not return it by itself.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class Stopwatch:
    """Seconds of each stage so far, without the stages inside it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context manager: count the time as that of `name`."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, None where there is none."""
    name = ctypes.util.find_library("c")
    return None if name is None else getattr(ctypes.CDLL(name), "malloc_trim", None)


def trim_heap() -> None:
    """Have the allocator return freed memory to the system, where it does not by itself.

    glibc keeps freed blocks of up to 32 MB for itself. Compressing two blocks of a 7B model, that
    came to 0.9 GB of nothing, a third of what the job needs.
    """
    if trim := _trim():
        trim(0)
