"""Several processes that compress one model together, as `torchrun` starts them.

They share the resume store's folder: what one of them has finished is a part there, whole or
absent, and who needs it waits for it. Several machines need a folder that all of them see. Sums
that all need at once are all-reduced on the CPU (gloo). Float sums depend on how they are split, so
results are the same bytes for the same number of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import DeltaMixError, first_line
from .resume_store import ResumeStore

_INTERVAL = 0.002  # seconds between two looks for a part


@dataclass(frozen=True)
class Workers:
    """This process is number `rank` of `size`.

    It waits `patience` seconds for the others: one that died is for the launcher to notice. What
    they do together raises DeltaMixError if they cannot find each other.
    """

    rank: int = 0
    size: int = 1
    patience: float = 24 * 3600.0

    @classmethod
    def launched(cls) -> Workers:
        """Read RANK and WORLD_SIZE, as launchers set them; alone without them."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def share(self, count: int) -> range:
        """Return which of `count` things are this process's: a slice, as long as anyone's."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Assign a rank to every matrix [m, n], dearest first to whoever has least to do."""
        costs = {name: float(m * n * min(m, n)) for name, (m, n) in shapes.items()}
        loads = [0.0] * self.size
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = loads.index(min(loads))
            loads[found[name]] += costs[name]
        return found

    def from_first(self, value: Any) -> Any:
        """Broadcast what the first process gives, anything that can be pickled."""
        shared = [value]
        if self.size > 1:
            dist.broadcast_object_list(shared, 0, group=_group(self))
        return shared[0]

    def add_up(self, tensor: Tensor) -> None:
        """All-reduce a tensor of any shape and dtype, in place."""
        if self.size > 1:
            total = tensor.cpu()
            dist.all_reduce(total, group=_group(self))
            tensor.copy_(total)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(group=_group(self))

    def wait(self, store: ResumeStore, part: str) -> tuple[dict[str, Tensor], Any]:
        """Load `part` when another process has finished it; DeltaMixError if it does not come."""
        until = time.monotonic() + self.patience
        while self.size > 1 and part not in store:  # alone: nobody will make it
            if time.monotonic() > until:
                raise DeltaMixError(f"another worker has not finished {part!r}; start all again")
            time.sleep(_INTERVAL)
        return store.load(part)


ALONE = Workers()


@cache
def _group(workers: Workers) -> dist.ProcessGroup:
    """Make a group of all processes on the CPU, whatever else they talk through."""
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise DeltaMixError(
                f"the {workers.size} workers cannot find each other: {first_line(error)}; start "
                "them by torchrun or accelerate launch"
            ) from error
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=workers.patience))
