"""Several processes that compress one model together, as `torchrun` starts them.

They share the journal's folder: what one of them has finished is a part there, whole or absent, and
who needs it waits for it. Several machines need a folder that all of them see. What is needed at
once goes through a gloo group of torch.distributed, as copies: nothing is rounded on the way.

So results do not depend on how many there are: a matrix is compressed by one process from the same
numbers, and every sum over the calibration text is added up in the order of the batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DeltaMixError, first_line
from .resume_store import ResumeStore

_LOOK = 0.02  # seconds between two looks for a part
PATIENCE = 24 * 3600.0  # seconds; a process that died is for the launcher to notice
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)


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

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: neighbours, as many as anyone's."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """A rank for every name, dearest first to whoever has least to do."""
        loads = [0.0] * self.size
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = loads.index(min(loads))
            loads[found[name]] += costs[name]
        return found

    def show(self, tensor: Tensor | None, owner: int) -> Tensor:
        """The tensor that process `owner` shows to all, on the CPU where it is another's.

        It has one to three dimensions, and a dtype of `_DTYPES`.

        Raises:
            DeltaMixError: the processes cannot find each other.
        """
        if self.size == 1 and tensor is not None:
            return tensor
        header = torch.zeros(5, dtype=torch.int64)  # dtype, dimensions, sizes
        if tensor is not None:
            header[0], header[1] = _DTYPES.index(tensor.dtype), tensor.dim()
            header[2 : 2 + tensor.dim()] = torch.tensor(tensor.shape)
        dist.broadcast(header, owner, _group(self.size))
        dtype, dim, *sizes = header.tolist()
        shown = torch.empty(sizes[:dim], dtype=_DTYPES[dtype])
        if tensor is not None:
            shown.copy_(tensor)
        dist.broadcast(shown.view(torch.uint8), owner, _group(self.size))
        return shown if tensor is None else tensor

    def add_up(self, tensor: Tensor) -> None:
        """Sum over all processes, in place; exact where all but one of them have zero."""
        if self.size == 1:
            return
        total = tensor.cpu()
        dist.all_reduce(total, group=_group(self.size))
        if total is not tensor:
            tensor.copy_(total)

    def finish(self, store: ResumeStore) -> None:
        """Say that this process needs nothing more; the first waits until nobody does."""
        store.write(f"worker {self.rank} is done", {})
        for rank in range(1, self.size if self.rank == 0 else 0):
            self.wait(store, f"worker {rank} is done")

    def wait(self, store: ResumeStore, part: str) -> None:
        """Return when another process has finished `part`.

        Raises:
            DeltaMixError: it does not come.
        """
        until = time.monotonic() + PATIENCE
        while part not in store:
            if time.monotonic() > until:
                raise DeltaMixError(f"another worker has not finished {part!r}; start all again")
            time.sleep(_LOOK)


@cache
def _group(size: int) -> dist.ProcessGroup:
    """A group of all processes that takes tensors on the CPU, whatever else they talk through.

    Raises:
        DeltaMixError: they were not started together.
    """
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise DeltaMixError(
                f"the {size} workers cannot find each other: {first_line(error)}; start them by "
                "torchrun or accelerate launch"
            ) from error
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))


def cost(m: int, n: int) -> float:
    """Of compressing an [m, n] matrix, in the unit of a multiplication."""
    return float(m * n * min(m, n))
