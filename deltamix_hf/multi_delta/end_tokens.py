"""Which tokens end a text: those of each row's own delta, in `generate` and in continuous batching.

Where rows of a call end by different tokens, `generate` is told the tokens of all of them, as
`RowEnds`, and what it makes of them (criteria that stop, processors that keep a text from ending)
looks at each row's own. Other settings of generation cannot differ by row: `config_mismatch`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
)

from ..errors import DeltaMixError
from .routing import Route

Ends = dict[str | None, list[int]]  # of a delta, None for the base; of others they are the model's
_MOST = 1000
_KEEP_FROM_ENDING = (
    ExponentialDecayLengthPenalty, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
)  # fmt: skip


def read_ends(value: Any, where: str) -> list[int]:
    """List the tokens of an `eos_token_id`: a number, several or None; negative ones are none.

    Raises DeltaMixError if it is something else.
    """
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if len(tokens) > _MOST or not all(type(t) is int and abs(t) < 2**31 for t in tokens):
        raise DeltaMixError(f"{where} has an eos_token_id that is no token: {shortened(value)}")
    return [token for token in tokens if token >= 0]


def repo_ends(read: Callable[[str], Any], config: Mapping[str, Any]) -> list[int] | None:
    """List the end tokens of a repo whose files `read` reads by name, as transformers finds them.

    None if it says nothing, neither in generation_config.json nor in its `config`. Raises
    DeltaMixError for what are no tokens.
    """
    settings = read("generation_config.json")
    if settings is None and config.get("eos_token_id") is None:
        return None
    settings = config if settings is None else settings
    return read_ends(settings.get("eos_token_id"), "the repo")


class RowEnds(list[int]):
    """The end tokens of all rows of a call, of which `rows` lists each row's own."""

    rows: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "RowEnds":
        """Put those of most rows first: what follows a text's end is the first, if no pad token."""
        counts = Counter(token for row in rows for token in row)
        made = cls(token for token, _ in counts.most_common())
        made.rows = rows
        return made

    def own(self, tokens: Tensor, rows: int) -> Tensor:
        """Tell which tokens [rows or 1, n] end their row, bool [rows, n]; rows repeat in place."""
        times, most = rows // len(self.rows), max(map(len, self.rows))
        if rows % len(self.rows):
            raise DeltaMixError(
                f"{len(self.rows)} rows were named, which end by different tokens, but {rows} are "
                "generated: give eos_token_id, or call generate once for each delta"
            )
        padded = [[*row, *[-1] * (most - len(row))] for row in self.rows for _ in range(times)]
        ends = torch.tensor(padded, device=tokens.device)
        return (tokens[:, :, None] == ends[:, None]).any(-1)


class _RowCriteria(EosTokenCriteria):
    def __init__(self, ends: RowEnds):
        super().__init__(ends)
        self.ends = ends

    def __call__(self, input_ids: Any, scores: Any, new_token_length: int = 1, **_: Any) -> Any:
        return self.ends.own(input_ids[:, -new_token_length:], len(input_ids)).any(-1)


class _RowProcessor(LogitsProcessor):
    """Apply `plain`, which changes scores of end tokens alone, to each row's own."""

    def __init__(self, plain: LogitsProcessor, ends: RowEnds):
        self.plain, self.ends = plain, ends

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        every = torch.arange(scores.shape[1], device=scores.device)[None]
        return torch.where(self.ends.own(every, len(scores)), self.plain(input_ids, scores), scores)


def by_row(plain: Any) -> Any:
    """Return `plain`, a maker of criteria or processors for `generate`, heeding each row's ends."""

    @wraps(plain)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        config: Any = args[0] if args else kwargs["generation_config"]
        ends = config.eos_token_id
        for i, one in enumerate(found if isinstance(ends, RowEnds) else ()):
            if type(one) is EosTokenCriteria:
                found[i] = _RowCriteria(ends)
            elif isinstance(one, _KEEP_FROM_ENDING):
                found[i] = _RowProcessor(one, ends)
        return found

    return made


def row_ends(
    model: PreTrainedModel, ends: Ends, route: Route, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the `eos_token_id` by which `generate` ends the rows of `route`; empty: the model's own.

    So it is if the caller of `generate(*args, **kwargs)` chose the tokens: as `eos_token_id`, as an
    `EosTokenCriteria`, or in a `generation_config` that has others than the model's.
    """
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    criteria = kwargs.get("stopping_criteria") or ()
    if (
        not ends
        or "eos_token_id" in kwargs
        or chose_ends(model, given)
        or any(isinstance(one, EosTokenCriteria) for one in criteria)
        or kwargs.get("cache_implementation") == "paged"  # continuous batching: request by request
    ):
        return {}
    plain = read_ends(model.generation_config.eos_token_id, "generation_config")
    rows = [ends.get(row, plain) for row in (route.rows[:1] if route.alike else route.rows)]
    if all(row == plain for row in rows):
        return {}
    if all(row == rows[0] for row in rows):
        return {"eos_token_id": rows[0] or None}
    return {"eos_token_id": RowEnds.of(rows)}


def chose_ends(model: PreTrainedModel, generation_config: Any) -> bool:
    """Tell whether a generation config has other end tokens than the model's own, if any."""
    ends = getattr(generation_config, "eos_token_id", None)
    return ends is not None and ends != model.generation_config.eos_token_id
