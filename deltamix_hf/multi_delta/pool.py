"""A bounded pool of deltas: what is in use stays, what was used longest ago makes room.

A delta is in one of three places: beside the base on the model's device (resident), in host memory,
or on disk alone. A batch asks for all its deltas at once (`holding`); those not resident are
loaded, after the least recently used ones that nobody uses have been moved out. So resident deltas
never exceed the budget, and since a batch never waits while it holds anything, no two batches can
wait for each other.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from ..checkpoint.delta_repo import StoredDelta
from ..errors import DeltaMixError


@dataclass
class Entry:
    """One delta of the pool."""

    nbytes: int
    placed: tuple[int, int]  # bytes on the device: by plain torch, by Triton kernels
    read: Callable[[], StoredDelta] | None  # from disk again; None: it is in memory only, and stays
    stored: StoredDelta | None  # its tensors in host memory, if they are kept there
    resident: bool = False
    users: int = 0  # batches that are using it
    used: int = 0  # when it was last asked for, by the pool's own count
    serial: int = field(default_factory=count().__next__)  # tells it from others of its name


@dataclass(frozen=True)
class DeltaMemory:
    """Bytes by delta: resident on the model's device, and kept in host memory to come back fast."""

    budget: int | None
    resident: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.resident.values())


class Pool:
    """Deltas by name. Safe to use from several threads.

    `place` puts a delta's tensors beside the base's, `remove` takes them away, after a placement
    that was interrupted too. `sizes` tells what a delta takes there, and `by_kernels` which of the
    two now. `active` is in use for all calls, until another is chosen: it stays, as compiled code
    and captured graphs read it without asking for it.
    """

    def __init__(
        self,
        place: Callable[[str, StoredDelta], None],
        remove: Callable[[str], None],
        sizes: Callable[[StoredDelta], tuple[int, int]],
        by_kernels: Callable[[], bool],
    ):
        self.place, self.remove, self.sizes, self.by_kernels = place, remove, sizes, by_kernels
        self.active: str | None = None
        self.budget: int | None = None
        self.host_budget = 0
        self.entries: dict[str, Entry] = {}
        self._changed = threading.Condition()
        self._clock = 0

    def __getstate__(self) -> dict[str, Any]:
        entries = {name: replace(entry, users=0) for name, entry in self.entries.items()}
        return {**vars(self), "entries": entries, "_changed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _changed=threading.Condition())

    def add(self, name: str, stored: StoredDelta, read: Callable[[], StoredDelta] | None) -> bool:
        """Take a new delta in, resident; tell whether it is the only one.

        Raises DeltaMixError if the name is taken, or there is no room for it.
        """
        with self._changed:
            self.check_new(name)
            self.entries[name] = Entry(stored.nbytes, self.sizes(stored), read, stored)
            try:
                with self.holding([name]):
                    pass
            except BaseException:
                del self.entries[name]
                raise
            return len(self.entries) == 1

    def check_new(self, name: str) -> None:
        """Raise DeltaMixError if the name is taken."""
        if name in self.entries:
            raise DeltaMixError(f"a delta called {name!r} is loaded already; delete it first")

    def discard(self, name: str) -> None:
        """Forget a delta as soon as no batch uses it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._entry(name).users)
            if self.entries.pop(name).resident:
                self.remove(name)
            self._changed.notify_all()

    def activate(self, name: str | None) -> None:
        """Keep this one resident from now on, and no longer the one that was active.

        Raises DeltaMixError for an unknown name, or if it exceeds the budget; the old one stays
        active.
        """
        with self._changed:
            before, self.active = self.active, None
            try:
                with self.holding([name] if name is not None else []):
                    self.active = name
            except BaseException:
                with self.holding([before] if before is not None else []):
                    self.active = before
                raise
            self._changed.notify_all()

    def _stays(self, name: str) -> bool:
        """Tell whether a delta stays resident once it is, even when no batch uses it."""
        return name == self.active or self.entries[name].read is None

    def resize(self, budget: int | None, host_budget: int) -> None:
        """Change the budgets; moves deltas out at once if need be.

        Raises DeltaMixError if what must stay exceeds the new budget; nothing is changed then.
        """
        with self._changed:
            before, self.budget = self.budget, budget
            if not self._make_room(()):
                self.budget = before
                entries, sizes = self.entries.items(), self.placed_bytes()
                staying = {n: sizes[n] for n, e in entries if e.users or self._stays(n)}
                raise DeltaMixError(
                    f"{sorted(staying)} are in use, or on no disk, and take "
                    f"{sum(staying.values()):,} bytes; the budget cannot be {budget:,}"
                )
            self.host_budget = host_budget
            self._trim_host()

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[None]:
        """Context manager: load these deltas and protect them from eviction.

        Raises DeltaMixError for an unknown name, no room for all, or one that cannot be read again.
        """
        names = list(dict.fromkeys(names))
        with self._changed:
            while not self._make_room([name for name in names if self._entry(name)]):
                self.check_possible(names)
                self._changed.wait()  # for another batch to end
            entries = [self.entries[name] for name in names]
            self._clock += 1
            for name, entry in zip(names, entries, strict=True):
                entry.used = self._clock
                if not entry.resident:
                    self._load(name, entry)
            for entry in entries:
                entry.users += 1
        try:
            yield
        finally:
            with self._changed:
                for entry in entries:
                    entry.users -= 1
                self._changed.notify_all()

    def memory(self) -> DeltaMemory:
        with self._changed:
            sizes = self.placed_bytes()
            resident = {n: sizes[n] for n, e in self.entries.items() if e.resident}
            host = {n: e.nbytes for n, e in self.entries.items() if e.stored is not None}
            return DeltaMemory(self.budget, resident, host)

    def placed_bytes(self) -> dict[str, int]:
        """Count what each delta takes on the device when it is there."""
        with self._changed:
            number = int(self.by_kernels())
            return {name: entry.placed[number] for name, entry in self.entries.items()}

    def check_possible(self, names: Sequence[str]) -> None:
        """Raise DeltaMixError for an unknown name, or if these can never be resident at once."""
        with self._changed:
            wanted, sizes = {name: self._entry(name) for name in names}, self.placed_bytes()
            others = sorted(self.entries.keys() - wanted)
            staying = [n for n in others if self.entries[n].resident and self._stays(n)]
            needed, beside = (sum(sizes[n] for n in some) for some in (wanted, staying))
            if self.budget is not None and needed + beside > self.budget:
                with_them = f" beside {staying}, which stay," if staying else ""
                raise DeltaMixError(
                    f"the deltas {list(wanted)} take {needed:,} bytes; the budget of "
                    f"{self.budget:,} bytes cannot hold them{with_them} at once: use fewer in a "
                    "batch, raise the budget, or set_delta(None)"
                )

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            known = sorted(self.entries)
            raise DeltaMixError(f"no delta called {name!r} is loaded; there are {known}")
        return self.entries[name]

    def _load(self, name: str, entry: Entry) -> None:
        stored = entry.stored
        if stored is None:
            assert entry.read is not None
            stored = entry.read()
        try:
            self.place(name, stored)
        except BaseException:  # interrupted, or the device is full
            self.remove(name)
            raise
        entry.resident, entry.stored, entry.placed = True, stored, self.sizes(stored)
        self._trim_host()
        if entry.stored is not None and entry.read is not None:  # kept, to come back fast
            entry.stored = stored.pinned()

    def _make_room(self, wanted: Sequence[str]) -> bool:
        """Move out what was used longest ago until all these fit; False: not possible now."""
        if self.budget is None:
            return True
        sizes = self.placed_bytes()
        resident = {name: e for name, e in self.entries.items() if e.resident}
        excess, leaving = sum(sizes[n] for n in {*resident, *wanted}) - self.budget, []
        for name, entry in sorted(resident.items(), key=lambda item: item[1].used):
            stays = entry.users or name in wanted or self._stays(name)
            if excess > 0 and not stays:
                leaving.append(name)
                excess -= sizes[name]
        if excess > 0:
            return False
        for name in leaving:
            self.remove(name)
            self.entries[name].resident = False
        return True

    def _trim_host(self) -> None:
        """Drop the copies used longest ago until the rest fits the host budget."""
        copies = [e for e in self.entries.values() if e.stored is not None and e.read is not None]
        excess = sum(entry.nbytes for entry in copies) - self.host_budget
        for entry in sorted(copies, key=lambda entry: entry.used):
            if excess > 0:
                entry.stored = None
                excess -= entry.nbytes
