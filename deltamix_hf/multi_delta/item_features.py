"""Route pictures, videos and sound to the rows of the batch that they belong to.

Models that read them beside text make the features of all items of a batch together, by methods
such as `get_image_features`, and put them in the places that the text keeps for them. A row may
have any number of items. How many it has follows from the tokens it keeps, and from the sizes of
the items; where that is not certain, rows with different deltas are refused. The method is then
called once for each delta, with its rows' items.
"""

import inspect
from collections.abc import Sequence
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from .routing import Route

_KINDS = "image", "video", "audio"
_BY_LAYER = "hidden_states", "attentions", "deepstack_features"  # outputs for each layer


def routed_features(cls: type[PreTrainedModel]) -> dict[str, Any]:
    """Return the methods of a class that make features, by name, so that they follow routes."""
    named = {f"get_{kind}_features": kind for kind in _KINDS}
    return {
        name: _by_delta(getattr(cls, name), kind)
        for name, kind in named.items()
        if hasattr(cls, name)
    }


def _by_delta(plain: Any, kind: str) -> Any:
    @wraps(plain)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        router = own.get("dm_whole", own.get("dm_deltas")).router
        if torch.compiler.is_compiling() or router.route.alike:
            return plain(self, *args, **kwargs)
        bound = inspect.signature(plain).bind(self, *args, **kwargs).arguments
        others = bound.pop("kwargs", {})
        _, *given = {**bound, **others}.items()
        items = _Items(kind, dict(given))
        rows = items.rows(self.config, router.ids)
        deltas = [router.route.of_rows(len(router.ids))[row] for row in rows]
        parts = []
        for delta in dict.fromkeys(deltas):
            own = [i for i, other in enumerate(deltas) if other == delta]
            with router.using(Route([delta])):
                parts.append((own, plain(self, **items.chosen(own))))
        return items.joined(parts)

    return features


class _Items:
    """Pictures, videos or pieces of sound of a batch, in order: `given` to a method, by name."""

    def __init__(self, kind: str, given: dict[str, Any]):
        self.kind, self.given = kind, given
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        self.name, main = next(iter(tensors.items()))
        grids = [value for key, value in tensors.items() if key.endswith("grid_thw")]
        self.count = len(grids[0] if grids else main)
        self.sizes = grids[0].prod(-1).tolist() if grids else [1] * self.count  # in entries of main
        # without more arguments, pictures in one tensor are all of a size
        self.sized = bool(grids) or (len(tensors) == 1 and main.dim() == 4)

    def rows(self, config: Any, ids: Tensor | None) -> list[int]:
        """Return the row of each item, for token ids [rows, length].

        Raises DeltaMixError where it is not certain.
        """
        names = [f"{self.kind}_token_id", f"{self.kind}_token_index"]
        token = next((t for n in names if (t := getattr(config, n, None)) is not None), None)
        kept = [] if ids is None or token is None else (ids == token).sum(1).tolist()
        if len(kept) == self.count and all(kept):
            return list(range(self.count))  # one each
        starts = self._places(sum(kept))
        ends = list(accumulate(kept))
        # an item's tokens are all in one row, and a row's tokens are those of its items
        if starts is None or not self.sized or not set(ends) <= set(starts):
            raise DeltaMixError(
                f"it is not certain which rows of the batch the {self.count} items of "
                f"{self.name} belong to: give one {self.kind} to each row, or all rows the same "
                "delta, and tokens in input_ids"
            )
        return [sum(end <= start for end in ends) for start in starts[:-1]]

    def _places(self, total: int) -> list[int] | None:
        """Return where each item begins, and the last ends, among `total` places; None if nowhere.

        Items take places by their sizes.
        """
        whole = sum(self.sizes)
        places = [total * size for size in accumulate(self.sizes, initial=0)]
        if not total or not whole or any(place % whole for place in places):
            return None
        return [place // whole for place in places]

    def chosen(self, own: Sequence[int]) -> dict[str, Any]:
        """Return the arguments for some of the items, by number."""
        return {key: self._pick(value, own) for key, value in self.given.items()}

    def _pick(self, value: Any, own: Sequence[int]) -> Any:
        if isinstance(value, list) and all(isinstance(one, Tensor) for one in value):
            return [value[i] for i in own]
        if not isinstance(value, Tensor):
            return value
        each = self._each(value, range(self.count))
        return torch.cat([each[i] for i in own])

    def _each(self, value: Tensor, own: Sequence[int]) -> Sequence[Tensor]:
        """Split a tensor of the items `own` among them: as many entries each, or by their sizes."""
        if len(value) == len(own):
            return value.split(1)
        places = self._places(
            sum(self.sizes) * len(value) // (sum(self.sizes[i] for i in own) or 1)
        )
        lengths = [] if places is None else [places[i + 1] - places[i] for i in own]
        if sum(lengths) != len(value):
            raise DeltaMixError(
                f"{list(value.shape)} is not what {len(own)} items of {self.name} are known to "
                "have: give all rows the same delta"
            )
        return value.split(lengths)

    def joined(self, parts: Sequence[tuple[Sequence[int], Any]]) -> Any:
        """Put together what the method returned for the items of each delta."""
        owners, values = zip(*parts, strict=True)
        first = values[0]
        if isinstance(first, dict):  # a ModelOutput
            kind: Any = type(first)
            return kind(**{key: self._field(key, owners, values) for key in first})
        return self._join(owners, values)

    def _field(self, key: str, owners: Any, values: Any) -> Any:
        found = [value[key] for value in values]
        if key in _BY_LAYER:
            return tuple(self._join(owners, layer) for layer in zip(*found, strict=True))
        return self._join(owners, found)

    def _join(self, owners: Sequence[Sequence[int]], values: Sequence[Any]) -> Any:
        if values[0] is None:
            return None
        tensors = isinstance(values[0], Tensor)
        split = [
            self._each(v, own) if tensors else v for own, v in zip(owners, values, strict=True)
        ]
        each = {i: x for own, one in zip(owners, split, strict=True)
                for i, x in zip(own, one, strict=True)}  # fmt: skip
        found = [each[i] for i in range(self.count)]
        return torch.cat(found) if tensors else found
