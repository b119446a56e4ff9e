"""The delta product on a CPU: packed bytes become levels by table look-up.

Unpacking codes and computing levels are a dozen small tensor operations a width, and at one token
their overhead is all the time there is. A byte of a plane holds 8/p codes of p bits, so one look-up
in a table [256, 8/p] of levels does both at once (3 bits: a byte of the high plane and four bits of
the low one, 4096 entries). Levels come out in the order (byte row, byte column, element in the
byte); instead of putting them in order, x is permuted on the way in and y on the way out, once for
each of the orders in use.

Widths 2, 3, 4 and 8, Gaussian codebook, one scale a vector: what the default method makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codebook, grid

Runs = tuple[tuple[int, int, int], ...]

# Width -> planes that order its levels: the byte rows its table look-ups come from.
_ORDER = {2: 2, 3: 2, 4: 4, 8: 8}


@dataclass(frozen=True)
class Part:
    """Ranks of one width on one side: their byte rows and their numbers, as slices or indices."""

    width: int
    count: int
    rows: slice | Tensor
    ranks: slice | Tensor


def supported(runs: Runs, gaussian: bool, group_size: int) -> bool:
    return gaussian and group_size == 0 and all(v in _ORDER and u in _ORDER for _, v, u in runs)


def low_rank(x: Tensor, v: Tensor, u: Tensor, ranks: Tensor, runs: Runs, m: int, n: int) -> Tensor:
    """x [M, n] -> (x·V̂ᵀ)·Ûᵀ [M, m] in x's dtype."""
    return _product(x, (v, 1, n), (u, 2, m), ranks, runs)


def low_rank_transposed(
    x: Tensor, v: Tensor, u: Tensor, ranks: Tensor, runs: Runs, m: int, n: int
) -> Tensor:
    """x [M, m] -> (x·Û)·V̂ [M, n] in x's dtype."""
    return _product(x, (u, 2, m), (v, 1, n), ranks, runs)


def _product(
    x: Tensor,
    enter: tuple[Tensor, int, int],
    leave: tuple[Tensor, int, int],
    ranks: Tensor,
    runs: Runs,
) -> Tensor:
    packed, side, length = enter
    columns = packed.shape[1]
    x = F.pad(x, (0, 8 * columns - length)).view(len(x), columns, 8)
    turned: dict[int, Tensor] = {}
    h = x.new_empty(len(x), len(ranks))
    for part in parts(runs, side):
        order = _ORDER[part.width]
        if order not in turned:
            turned[order] = x.unflatten(2, (order, -1)).transpose(1, 2).flatten(1)
        h[:, part.ranks] = turned[order] @ _levels(packed, part, x.dtype).T
    scales = grid.scales_from_bits(ranks[:, 1:].contiguous())
    wide = torch.promote_types(x.dtype, torch.float32)
    h = (h * scales.to(wide).prod(1)).to(x.dtype)

    packed, side, length = leave
    columns = packed.shape[1]
    sums: dict[int, Tensor] = {}
    for part in parts(runs, side):
        order = _ORDER[part.width]
        found = h[:, part.ranks] @ _levels(packed, part, x.dtype)
        sums[order] = sums[order].add_(found) if order in sums else found
    y = x.new_zeros(len(x), columns, 8)
    for order, found in sums.items():
        y += found.view(len(x), order, columns, 8 // order).transpose(1, 2).flatten(2)
    return y.flatten(1)[:, :length]


@lru_cache(maxsize=8192)
def parts(runs: Runs, side: int) -> tuple[Part, ...]:
    """The ranks of `runs` by their width on one side (1: V, 2: U)."""
    rows: dict[int, list[int]] = {}
    ranks: dict[int, list[int]] = {}
    row = rank = 0
    for run in runs:
        count, width = run[0], run[side]
        rows.setdefault(width, []).extend(range(row, row + count * width))
        ranks.setdefault(width, []).extend(range(rank, rank + count))
        row, rank = row + count * width, rank + count
    return tuple(
        Part(width, len(ranks[width]), _index(rows[width]), _index(ranks[width])) for width in rows
    )


def _index(numbers: list[int]) -> slice | Tensor:
    """A slice if the numbers are consecutive."""
    first, last = numbers[0], numbers[-1]
    if last - first + 1 == len(numbers):
        return slice(first, last + 1)
    return torch.tensor(numbers)


def _levels(packed: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """Levels [ranks, 8·columns] of a part, in the order of its width, without scales."""
    rows = packed[part.rows].view(part.count, part.width, -1)
    if part.width == 3:
        low = rows[:, 2:].int() >> _NIBBLES
        index = rows[:, :2].int() | ((low & 15) << 8)
    else:
        index = rows.int()
    return F.embedding(index, _table(part.width, dtype)).flatten(1)


_NIBBLES = torch.tensor([0, 4], dtype=torch.int32)[:, None]


@cache
def _table(width: int, dtype: torch.dtype) -> Tensor:
    """Levels [256, 8 / order] of every byte; of 3 bits [4096, 4], by high byte and low nibble."""
    plane = _ORDER[width]
    numbers = torch.arange(4096 if width == 3 else 256)
    element = torch.arange(8 // plane)
    codes = (numbers[:, None] >> (element * plane)) & ((1 << plane) - 1)
    if width == 3:
        codes = (codes << 1) | ((numbers[:, None] >> (8 + element)) & 1)
    bits = torch.tensor(width)
    return codebook.decode(codes.to(torch.uint8), bits).to(dtype)
