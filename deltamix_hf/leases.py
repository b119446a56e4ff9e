"""The deltas of a request that runs for a while: held, and told apart from all others.

A request of continuous batching begins in one thread and ends in another, so what holds its deltas
in the pool is an object, a lease. Its salt stands for exactly these deltas: their names and which
loading of each name it was. Salted tokens hash to other values than those of any other deltas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from .plans import Combination
from .pool import Pool
from .routing import Names, Route, Router, check_rows


class Deltas(Protocol):
    """What a request needs of a model's deltas (`Tenants`)."""

    pool: Pool
    router: Router

    def route(self, names: Names) -> Route | None:
        """The rows of a call that names its deltas, None if it does not."""


class Lease:
    """Holds deltas in the pool until its end; they must fit, and may have to be waited for.

    Attributes:
        salt: four numbers below 2³¹; () for the base.

    Raises:
        DeltaMixError: an unknown name, or there can be no room for the deltas.
    """

    def __init__(self, pool: Pool, combination: Combination):
        self.combination = combination
        self._hold = ExitStack()
        self._hold.enter_context(pool.holding(combination))
        # Not drawn at random: where several processes run one model, their hashes must agree.
        loaded = [(name, pool.entries[name].serial) for name in combination]
        digest = hashlib.blake2b(repr(loaded).encode(), digest_size=16).digest()
        words = [int.from_bytes(digest[i : i + 4], "big") >> 1 for i in range(0, 16, 4)]
        self.salt = tuple(words) if combination else ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self  # a request's forks run under the same lease

    def end(self) -> None:
        """Let the deltas go; doing so twice is harmless."""
        self._hold.close()

    def salted(self, tokens: list[int]) -> list[int]:
        """Other first tokens: that is enough where a block's hash covers all blocks before it."""
        changed = [token ^ salt for token, salt in zip(tokens, self.salt, strict=False)]
        return changed + tokens[len(changed) :]


class Prompt(list[int]):
    """Token ids that know their deltas, in whatever order they are taken up."""

    def __init__(self, ids: Sequence[int], combination: Combination):
        super().__init__(ids)
        self.combination = combination


def name_prompts(tenants: Deltas, inputs: Sequence[Sequence[int]], names: Names) -> list[Prompt]:
    """Inputs that know their deltas: those named, or else those in use for all calls.

    Raises:
        DeltaMixError: a wrong number of names. Whether they are known is seen by who holds them.
    """
    if names is not None and not isinstance(names, str):
        check_rows(len(names), len(inputs))
    route = (tenants.route(names) if inputs else None) or tenants.router.route
    rows = route.rows if route.single is None else [route.single] * len(inputs)
    return [Prompt(ids, row) for ids, row in zip(inputs, rows, strict=True)]


def names_of(requests: Iterable[Prompt | Lease]) -> list[str]:
    return list(dict.fromkeys(name for request in requests for name in request.combination))
