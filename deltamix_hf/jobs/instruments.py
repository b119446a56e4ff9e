"""Measure a long run's seconds by stage, and keep its memory down.

Every moment belongs to the innermost stage that runs. Memory that was freed goes back to the system
where the allocator does not return it by itself.
"""

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
        self._inside = 0.0  # seconds of the stages that have ended in the one that runs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context manager: count the time as that of `name`."""
        began, outer, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[name] += spent - self._inside
            self._inside = outer + spent


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
