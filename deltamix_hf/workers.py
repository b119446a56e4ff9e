"""Several processes that compress one model together, as `torchrun` starts them.

They share the journal's folder and nothing else: what one of them has finished is a part there,
whole or absent, and who needs it waits for it. So results cannot depend on how many there are: a
matrix is compressed by one process from the same numbers, and sums over the calibration text are
handed from rank to rank and added up in the order of the batches. Several machines need a folder
that all of them see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import DeltaMixError
from .journal import Journal

_LOOK = 0.02  # seconds between two looks for a part
PATIENCE = 24 * 3600.0  # seconds; a process that died is for the launcher to notice


@dataclass(frozen=True)
class Workers:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls) -> Workers:
        """As the launcher says by RANK and WORLD_SIZE; alone without it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def last(self) -> bool:
        return self.rank + 1 == self.size

    def batches(self, count: int) -> range:
        """Which of `count` batches are this process's: neighbours, as many as anyone's."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """A rank for every name, dearest first to whoever has least to do."""
        loads = [0.0] * self.size
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = loads.index(min(loads))
            loads[found[name]] += costs[name]
        return found

    def finish(self, journal: Journal) -> None:
        """Say that this process needs nothing more; the first waits until nobody does."""
        journal.write(f"worker {self.rank} is done", {})
        for rank in range(1, self.size if self.rank == 0 else 0):
            self.wait(journal, f"worker {rank} is done")

    def wait(self, journal: Journal, part: str) -> None:
        """Return when another process has finished `part`.

        Raises:
            DeltaMixError: it does not come.
        """
        until = time.monotonic() + PATIENCE
        while part not in journal:
            if time.monotonic() > until:
                raise DeltaMixError(f"another worker has not finished {part!r}; start all again")
            time.sleep(_LOOK)


def cost(m: int, n: int) -> float:
    """Of compressing an [m, n] matrix, in the unit of a multiplication."""
    return float(m * n * min(m, n))
