"""Norms whose weights differ from one delta to the next: each row's by the weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .batch import Batch

Overlay = dict[str, nn.Parameter]  # name of a parameter of one module -> a delta's own value


def by_row(module: Any, batch: Batch) -> dict[int, Overlay]:
    """Make a module run each row by the tensors of its delta.

    What it returns says what each delta, by number, puts in place of the module's own; change it at
    will.
    """
    if "dm_overlays" in module.__dict__:
        return module.dm_overlays
    overlays: dict[int, Overlay] = {}
    plain = module.forward

    def forward(x: Tensor, *rest: Any) -> Any:
        groups = batch.of_tokens(x, overlays) if overlays else []
        if len(groups) == 1 and len(groups[0][1]) == len(x):
            with _replaced(module, overlays[groups[0][0]]):
                return plain(x, *rest)
        found = []
        for number, rows in groups:  # first: the call for all rows may write into x
            with _replaced(module, overlays[number]):
                chosen = [value[rows] if isinstance(value, Tensor) else value for value in rest]
                found.append((rows, plain(x[rows], *chosen)))
        y = plain(x, *rest)
        for rows, part in found:
            for whole, some in zip(_tensors(y), _tensors(part), strict=True):
                whole.index_copy_(0, rows, some)
        return y

    module.dm_overlays = overlays
    module.forward = forward
    return overlays


@contextmanager
def _replaced(module: nn.Module, overlay: Overlay) -> Iterator[None]:
    own = {name: module._parameters[name] for name in overlay}
    module._parameters.update(overlay)
    try:
        yield
    finally:
        module._parameters.update(own)


def _tensors(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)
