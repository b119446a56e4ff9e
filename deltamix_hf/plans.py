"""Which slot each row of a batch uses, as tensors on the device: what the grouped kernels read.

Every resident delta has a slot, the same in the tables of all modules. An eager call gets a plan of
its own for its rows. A captured CUDA graph reads the same memory at every replay; so there is one
fixed plan for each batch size, which follows what `use_deltas` and `set_delta` say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SLOTS = 256  # deltas the kernels' tables can hold
Combination = tuple[str, ...]  # names of deltas that are added up; () is the base


class Slots(dict[str, int]):
    """Resident delta -> its slot. Deltas beyond the last slot have none."""

    def take(self, name: str) -> bool:
        """Give a delta a slot; False if all are taken."""
        free = set(range(SLOTS)) - set(self.values())
        if name not in self and free:
            self[name] = min(free)
        return name in self


class Plan:
    """Rows by slot, int32.

    Attributes:
        order: [rows], the rows sorted by slot, those of the base last.
        starts: [entries + 1], where each entry's rows begin in `order`.
        slots: [entries], each entry's slot. Entries past those in use have no rows.
        of_rows: [rows], each row's slot, -1 for the base.
        captured: a CUDA graph reads it.
    """

    def __init__(self, rows: int, entries: int, device: torch.device):
        self.rows, self.entries, self.captured = rows, entries, False
        width = (rows + 4) // 4 * 4  # each begins at a multiple of 16 bytes
        self._memory = torch.zeros(4, width, dtype=torch.int32, device=device)
        self.order, self.starts, self.slots, self.of_rows = self._parts(self._memory)

    def _parts(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ends = self.rows, self.entries + 1, self.entries, self.rows
        order, starts, slots, of_rows = (
            row[:end] for row, end in zip(memory.unbind(), ends, strict=True)
        )
        return order, starts, slots, of_rows

    def load(self, rows: Sequence[Combination], slots: Mapping[str, int]) -> None:
        """Write these rows, of at most one delta each, into the same memory."""
        numbers = [slots.get(row[0], -1) if row else -1 for row in rows]
        used = sorted(set(numbers) - {-1})
        memory = torch.zeros(self._memory.shape, dtype=torch.int32)
        order, starts, entries, of_rows = self._parts(memory)
        by_slot = sorted(range(self.rows), key=lambda i: (numbers[i] < 0, numbers[i]))
        order[:] = torch.tensor(by_slot)
        counts = [numbers.count(slot) for slot in used] + [0] * (self.entries - len(used))
        starts[1:] = torch.tensor(counts, dtype=torch.int64).cumsum(0)
        entries[: len(used)] = torch.tensor(used)
        of_rows[:] = torch.tensor(numbers)
        self._memory.copy_(memory)
