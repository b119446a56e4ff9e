"""Which deltas each row of a batch takes.

A row takes a combination of deltas, normally one, or none: the plain base. Several are added up.
The rows named by the caller may each stand for several rows of what a layer sees: beams and
returned sequences repeat rows in place, and layers that flatten [batch, length] to one dimension
repeat each row `length` times. Both keep the order, so row i of L is row i // (L / batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import DeltaMixError

Combination = tuple[str, ...]  # names of deltas that are added up; () is the base
BASE = "__base__"  # what PEFT calls it; None means the same


class Route:
    """Combinations of a batch's rows, in order."""

    def __init__(self, rows: Sequence[Combination]):
        self.rows = tuple(rows)
        self.distinct = tuple(dict.fromkeys(self.rows))
        self._index: dict[tuple[int, torch.device], list[tuple[Combination, Tensor]]] = {}

    @property
    def single(self) -> Combination | None:
        """The combination of all rows, if they share one."""
        return self.distinct[0] if len(self.distinct) == 1 else None

    def of_batch(self, rows: int) -> Route:
        """The same for a batch in which each row is repeated in place.

        Raises:
            DeltaMixError: `rows` is no multiple of the rows named.
        """
        if self.single is not None or rows == len(self.rows):
            return self
        if rows % len(self.rows):
            raise DeltaMixError(
                f"{len(self.rows)} rows were named, but the batch has {rows}: give one name for "
                "each row"
            )
        return Route([row for row in self.rows for _ in range(rows // len(self.rows))])

    def groups(self, length: int, device: torch.device) -> list[tuple[Combination, Tensor]]:
        """Row numbers int64 of every combination but the base, among `length` rows."""
        key = length, device
        if key not in self._index:
            numbers = torch.arange(length, device=device).view(len(self.rows), -1)
            self._index[key] = [
                (found, numbers[[i for i, row in enumerate(self.rows) if row == found]].flatten())
                for found in self.distinct
                if found
            ]
        return self._index[key]


class Router:
    """The route in force: the one of the running call, or else of all calls."""

    def __init__(self) -> None:
        self.default = Route([()])
        self._current: ContextVar[Route | None] = ContextVar("deltamix_route", default=None)

    @property
    def route(self) -> Route:
        return self._current.get() or self.default

    @contextmanager
    def using(self, route: Route | None) -> Iterator[None]:
        """Use `route` within; None leaves it as it is. Other threads keep theirs."""
        if route is None:
            yield
            return
        token = self._current.set(route)
        try:
            yield
        finally:
            self._current.reset(token)
