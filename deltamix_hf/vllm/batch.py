"""Which rows of a batch take which delta, and modules that treat rows of deltas in another way.

vLLM flattens all requests' tokens to one dimension. Layers see all tokens [tokens, ...]; the head
sees the rows whose logits are wanted, one or more of each request, or, for log-probabilities of
prompts, a slice of the tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeltaMixError

Groups = list[tuple[int, Tensor]]  # a delta's number and its rows, int64
Overlay = dict[str, nn.Parameter]  # name of a parameter of one module -> a delta's own value
LARGEST = 65504.0  # of float16: a KV cache of any dtype holds it, and its products stay finite


class Batch:
    """Numbers of the deltas of the running batch, 0 being the base."""

    def __init__(self) -> None:
        self.set((), ())

    def set(
        self, tokens: Sequence[int], wanted: Sequence[int], known: Collection[int] = ()
    ) -> None:
        """Set the number of each token's delta, and of each row whose logits are sampled.

        Raises DeltaMixError for one that is not among `known`: the base would answer in its place.
        """
        if unknown := {*tokens, *wanted} - {0, *known}:
            raise DeltaMixError(
                f"a request names delta {min(unknown)}, which is not loaded: load it first, and "
                "give each delta a name and a number of its own"
            )
        self.tokens, self.wanted = tuple(tokens), tuple(wanted)
        self._groups: dict[tuple[tuple[int, ...], torch.device], Groups] = {}

    def groups(self, x: Tensor, known: Collection[int], head: bool = False) -> Groups:
        """Find the rows of x [tokens, ...] of each delta that is among `known`.

        `head`: x [rows, n] is what the output head sees. Raises DeltaMixError if x has another
        number of rows.
        """
        numbers = self.wanted if head else self.tokens
        width = x.shape[-1] * x.element_size()
        if head and x.untyped_storage().nbytes() == len(self.tokens) * width:  # a slice of all
            first = x.storage_offset() // x.shape[-1]
            numbers = self.tokens[first : first + len(x)]
        if not any(number in known for number in set(numbers)):
            return []
        if len(numbers) != len(x):
            raise DeltaMixError(
                f"a layer sees {len(x)} rows of a batch of {len(numbers)}: this model cannot give "
                "its requests different deltas"
            )
        key = numbers, x.device
        if key not in self._groups:
            every = torch.tensor(numbers, device=x.device)
            used = sorted(set(numbers) - {0})
            self._groups[key] = [(number, (every == number).nonzero()[:, 0]) for number in used]
        return [(number, rows) for number, rows in self._groups[key] if number in known]

    def of_deltas(self, x: Tensor) -> Tensor | None:
        """Find the rows of x [tokens, ...] of any delta, int64; all if x has not the tokens' rows.

        None if there are none.
        """
        used = {*self.tokens} - {0}
        if used and len(x) != len(self.tokens):
            return torch.arange(len(x), device=x.device)
        rows = [rows for _, rows in self.groups(x, used)]
        return torch.cat(rows) if rows else None


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
        groups = batch.groups(x, overlays) if overlays else []
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


def keep_finite(module: Any, batch: Batch) -> None:
    """Bound what an attention layer is given in rows of deltas: NaN becomes 0.

    What it keeps lies in blocks that other requests get later and nothing clears: there a masked
    NaN is multiplied by 0, and stays NaN.
    """
    plain = module.forward

    def forward(*given: Any, **named: Any) -> Any:
        for x in (*given, *named.values()):
            if isinstance(x, Tensor) and x.is_floating_point():
                rows = batch.of_deltas(x)
                if rows is not None:
                    x.index_copy_(0, rows, x[rows].clamp(-LARGEST, LARGEST).nan_to_num_(0.0))
        return plain(*given, **named)

    module.forward = forward


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
