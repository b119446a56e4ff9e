"""Which delta each row of a batch takes, and which slot of the kernels' tables that is.

A row takes one delta, or None: the plain base. The rows named by the caller may each stand for
several rows of what a layer sees: beams and returned sequences repeat rows in place, and layers
that flatten [batch, length] to one dimension repeat each row `length` times. Both keep the order,
so row i of L is row i // (L / batch).

Continuous batching packs the tokens of many requests into one row [1, tokens]; there, every token
has its own route.

Every resident delta has a slot, the same in the tables of all modules. An eager call gets a plan of
its own, tensors on the device, for its rows. A captured CUDA graph reads the same memory at every
replay; so there is one fixed plan for each batch size, which follows what `use_deltas` and
`set_delta` say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import accumulate
from threading import Lock, RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DeltaMixError
from ..ops.dispatch import capturing, persistent

Rows = Sequence[str | None]  # each row's delta, None for the base
Names = str | Rows | None
BASE = "__base__"  # what PEFT calls it; None means the same
_MOST_PLANS = 64  # batch sizes for which a graph may be recorded


def row_delta(name: str | None) -> str | None:
    """Return the delta of a row by a caller's name for it, None for the base.

    Raises DeltaMixError for several names, or something else that is none.
    """
    if name is not None and not isinstance(name, str):
        raise DeltaMixError(
            f"{name!r} is not the name of one delta: set_delta takes one for all calls, and "
            "delta_names or use_deltas one for each row; deltas are not added up"
        )
    return None if name == BASE else name


def named_route(names: Names, batch: int | None = None) -> Route | None:
    """Return the route of a call that names its deltas; None if it does not.

    Raises DeltaMixError for an empty list, several names for one row, or a list that has not a name
    for each of the `batch` rows.
    """
    if names is None:
        return None
    rows = [names] if isinstance(names, str) else list(names)
    if batch is not None and not isinstance(names, str) and len(rows) != batch:
        raise DeltaMixError(
            f"delta_names has {len(rows)} names for a batch of {batch} rows; give one name for "
            "each row (a pipeline calls for batch_size texts at a time), or a single one for all"
        )
    if not rows:
        raise DeltaMixError("delta_names is empty; give one name for each row, or one for all")
    return Route([row_delta(name) for name in rows])


class Route:
    """The deltas of a batch's rows, in order; `names` are those in use, `alike` if it is one."""

    compiled = False  # compiled code runs it: `persistent` makes what outlives the call

    def __init__(self, rows: Rows):
        self.rows = tuple(rows)
        self.alike = len(set(rows)) == 1
        self.names = [name for name in dict.fromkeys(rows) if name is not None]
        self._batches: dict[int, Route] = {}
        self._made: dict[Any, Any] = {}

    def of_batch(self, rows: int) -> Route:
        """Return the route of a batch in which each row is repeated in place.

        Raises DeltaMixError if `rows` is no multiple of the rows named.
        """
        if self.alike or rows == len(self.rows):
            return self
        if rows % len(self.rows):
            raise DeltaMixError(
                f"{len(self.rows)} rows were named, but the batch has {rows}: give one name for "
                "each row"
            )
        if rows not in self._batches:
            self._batches[rows] = Route(self.of_rows(rows))
        return self._batches[rows]

    def of_rows(self, rows: int) -> Rows:
        """List the delta of each of `rows` rows, a multiple of those named if these differ."""
        if self.alike:
            return [self.rows[0]] * rows
        return [row for row in self.rows for _ in range(rows // len(self.rows))]

    def plan(self, rows: int, device: torch.device, slots: Slots) -> RowSlots:
        """Return the slots of `rows` rows, while the route's deltas stay resident."""
        key, most = (RowSlots, rows, device), len(self.names)
        return self._once(key, lambda: RowSlots(self.of_rows(rows), most, device, slots))

    def groups(self, length: int, device: torch.device) -> list[tuple[str, Tensor]]:
        """Return the row numbers, int64, of every delta in use, among `length` rows."""

        def make() -> list[tuple[str, Tensor]]:
            numbers = torch.arange(length, device=device).view(len(self.rows), -1)
            places = {n: [i for i, row in enumerate(self.rows) if row == n] for n in self.names}
            return [(name, numbers[own].flatten()) for name, own in places.items()]

        return self._once((Tensor, length, device), make)

    def _once(self, key: tuple[type, int, torch.device], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = persistent(key[-1], make) if self.compiled else make()
        return self._made[key]


class PackedRoute(Route):
    """The deltas of the tokens of many requests in one row [1, tokens].

    `rows` has each request's delta, or None, in the order of their tokens, `lengths` how many it
    has, and `kept` the deltas of the tokens whose logits are wanted, which `head` sees alone. Other
    modules see `tokens`, a row for each.
    """

    def __init__(
        self, rows: Rows, lengths: Sequence[int], kept: Rows = (), head: nn.Module | None = None
    ):
        super().__init__([row for row, n in zip(rows, lengths, strict=True) for _ in range(n)])
        self.tokens, self.kept, self.head = Route(self.rows), Route(kept), head

    def of_batch(self, rows: int) -> Route:
        return self


class _Call(NamedTuple):
    """What is known of the running call; `recomputed`: in the backward pass, by checkpointing."""

    route: Route | None = None
    ids: Tensor | None = None
    recomputed: bool = False


class Router:
    """The route in force: the one of the running call, or else of all calls.

    Captured CUDA graphs follow another: the route last set for all calls, or the one announced
    until a `with` ends.
    """

    model: Any = None  # whose router it is

    def __init__(self) -> None:
        self.default = Route([None])
        self.slots = Slots()  # of the resident deltas
        self.turn = RLock()  # held by the thread that announces
        self._call: ContextVar[_Call] = ContextVar("deltamix_call", default=_Call())  # noqa: B039
        self._announced: list[Route] = []  # the last one counts
        self._fixed: dict[tuple[int, torch.device], RowSlots] = {}
        self._writing = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.default.rows, "slots": self.slots, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Router.__init__(self)  # calls that run, and graphs, are those of the original
        self.default = Route(state["rows"])
        self.slots, self.model = state["slots"], state["model"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        if self.model is not None and id(self.model) not in memo:
            raise DeltaMixError(
                "a part of a model with named deltas cannot be copied by itself (for peft's "
                "modules_to_save, say): copy the whole model, or load the delta repo alone with "
                "from_pretrained"
            )
        made = memo[id(self)] = Router()
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    @property
    def route(self) -> Route:
        """The route of the running call.

        Raises DeltaMixError in the backward pass, if what runs there has not brought its own.
        """
        call = self._call.get()
        if torch._C._current_autograd_node() is not None and not call.recomputed:
            raise DeltaMixError(
                "a layer with deltas runs once more in the backward pass, where its rows' deltas "
                "are not known: use gradient_checkpointing_enable, which remembers them"
            )
        return call.route or self.default

    @property
    def ids(self) -> Tensor | None:
        """The tokens int64 [rows, length] of the running call, None if it has none."""
        return self._call.get().ids

    @contextmanager
    def using(
        self, route: Route | None, ids: Tensor | None = None, recomputed: bool = False
    ) -> Iterator[None]:
        """Context manager: use `route`; None leaves it as it is. Other threads keep theirs.

        `ids` are the call's tokens int64 [rows, length], if they are known; `recomputed` says that
        its layers run once more.
        """
        before = self._call.get()
        ids = before.ids if ids is None else ids
        token = self._call.set(_Call(route or before.route, ids, recomputed or before.recomputed))
        try:
            yield
        finally:
            self._call.reset(token)

    def set_default(self, route: Route) -> None:
        """Use `route` in all calls that name none, and in captured graphs."""
        self.default = route
        self._load_fixed()

    @contextmanager
    def announcing(self, route: Route) -> Iterator[None]:
        """Context manager: use `route` in captured graphs too; the thread has its turn."""
        self._announced.append(route)
        try:
            self._load_fixed()
            with self.using(route):
                yield
        finally:
            self._announced.pop()
            self._load_fixed()

    def plan(self, rows: int, device: torch.device) -> RowSlots:
        """Return the slots of a batch; while a CUDA graph is recorded, in memory that stays.

        Raises DeltaMixError if a graph is recorded, but no call like it ran before, or its deltas
        were named in the call.
        """
        fixed = self._fixed.get((rows, device))
        if capturing(device):
            if fixed is None or self.route.of_rows(rows) != self._of_graphs(rows):
                raise DeltaMixError(
                    "before a CUDA graph is recorded, run the same once, and name the deltas with "
                    "use_deltas or set_delta around both, not in the call"
                )
            fixed.captured = True
            return fixed
        if fixed is None:
            self._add_fixed(rows, device)
        return self.route.plan(rows, device, self.slots)

    def _of_graphs(self, rows: int) -> Rows:
        """List the rows that graphs of a batch size follow: the base if those named do not fit."""
        route = (self._announced or [self.default])[-1]
        return [None] * rows if rows % len(route.rows) else route.of_rows(rows)

    def _add_fixed(self, rows: int, device: torch.device) -> None:
        """Memory for graphs of this batch size, should one be recorded."""
        with self._writing:
            idle = [key for key, plan in self._fixed.items() if not plan.captured]
            for key in idle[: max(0, len(idle) + 1 - _MOST_PLANS)]:
                del self._fixed[key]
            wanted, most = self._of_graphs(rows), min(rows, self.slots.size)
            make = partial(RowSlots, wanted, most, device, self.slots)
            self._fixed[rows, device] = persistent(device, make)

    def _load_fixed(self) -> None:
        """Write the rows that captured graphs follow."""
        with self._writing:
            for (rows, _), plan in self._fixed.items():
                plan.load(self._of_graphs(rows), self.slots)


class Slots(dict[str, int]):
    """Resident delta -> its slot in the kernels' tables. Deltas beyond the last slot have none."""

    size = 256  # deltas that the tables can hold

    def take(self, name: str) -> bool:
        """Give a delta a slot; False if all are taken."""
        free = set(range(self.size)) - set(self.values())
        if name not in self and free:
            self[name] = min(free)
        return name in self


class RowSlots:
    """Rows by slot, int32.

    Attributes:
        order: [rows], the rows sorted by slot, those of the base last.
        starts: [entries + 1], where each entry's rows begin in `order`.
        slots: [entries], each entry's slot. Entries past those in use have no rows.
        of_rows: [rows], each row's slot, -1 for the base.
        captured: a CUDA graph reads it.
    """

    def __init__(self, rows: Rows, entries: int, device: torch.device, slots: Mapping[str, int]):
        self.rows, self.entries, self.captured = len(rows), entries, False
        width = (self.rows + 4) // 4 * 4  # each begins at a multiple of 16 bytes
        self._memory = torch.empty(4, width, dtype=torch.int32, device=device)
        ends = self.rows, entries + 1, entries, self.rows
        parts = [row[:end] for row, end in zip(self._memory, ends, strict=True)]
        self.order, self.starts, self.slots, self.of_rows = parts
        self.load(rows, slots)

    def load(self, rows: Rows, slots: Mapping[str, int]) -> None:
        """Write these rows into the same memory."""
        of_rows = [-1 if row is None else slots.get(row, -1) for row in rows]
        used = sorted(set(of_rows) - {-1})
        order = sorted(range(self.rows), key=lambda i: (of_rows[i] < 0, of_rows[i]))
        starts = [0, *accumulate(of_rows.count(slot) for slot in used)]
        starts += starts[-1:] * (self.entries - len(used))
        width, parts = self._memory.shape[1], (order, starts, used, of_rows)
        padded = [part + [0] * (width - len(part)) for part in parts]
        self._memory.copy_(torch.tensor(padded, dtype=torch.int32))
