"""The delta product on a CPU: packed bytes become levels by table look-up.

Unpacking codes and computing levels are a dozen small tensor operations a width, and at one token
their overhead is all the time there is. A byte of a plane holds 8/p codes of p bits, so one look-up
in a table [256, 8/p] of levels does both at once (3 bits: a byte of the high plane and four bits of
the low one, 4096 entries). Levels come out in the order (byte row, byte column, element in the
byte); instead of putting them in order, x is permuted on the way in and y on the way out, once for
each of the orders in use.

Widths 2, 3, 4 and 8, Gaussian codebook, one scale a vector except for U of embeddings: what the
default method makes. Levels of a U with groups are multiplied by their scales as they are read.
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


@dataclass(frozen=True)
class _Side:
    """Packed codes of one factor, `number` 1 for V and 2 for U, and its scales.

    `scales` float32 [k, byte columns], or None: one scale a vector, applied to h.
    """

    packed: Tensor
    number: int
    length: int
    scales: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.packed.shape[1]


def supported(runs: Runs, gaussian: bool, group_sizes: tuple[int, int]) -> bool:
    v, u = group_sizes
    whole_bytes = v == 0 and u % 8 == 0
    return gaussian and whole_bytes and all(v in _ORDER and u in _ORDER for _, v, u in runs)


def low_rank(
    x: Tensor, v: Tensor, u: Tensor, ranks: Tensor, runs: Runs, m: int, n: int, u_group: int = 0
) -> Tensor:
    """x [M, n] -> (x·V̂ᵀ)·Ûᵀ [M, m] in x's dtype; `u_group`: U's group size."""
    right, left, scales = _sides(v, u, ranks, m, n, u_group)
    return _product(x, right, left, scales, runs)


def low_rank_transposed(
    x: Tensor, v: Tensor, u: Tensor, ranks: Tensor, runs: Runs, m: int, n: int, u_group: int = 0
) -> Tensor:
    """x [M, m] -> (x·Û)·V̂ [M, n] in x's dtype."""
    right, left, scales = _sides(v, u, ranks, m, n, u_group)
    return _product(x, left, right, scales, runs)


def _sides(
    v: Tensor, u: Tensor, ranks: Tensor, m: int, n: int, u_group: int
) -> tuple[_Side, _Side, Tensor]:
    """Both factors, and the scales [k] that apply to whole ranks."""
    scales = grid.scales_from_bits(ranks[:, 1:].contiguous())
    right = _Side(v, 1, n)
    if not u_group:
        return right, _Side(u, 2, m), scales.prod(1)
    by_column = scales[:, 1:].repeat_interleave(u_group // 8, 1)[:, : u.shape[1]]
    return right, _Side(u, 2, m, by_column), scales[:, 0]


def _product(x: Tensor, enter: _Side, leave: _Side, scales: Tensor, runs: Runs) -> Tensor:
    x = F.pad(x, (0, 8 * enter.columns - enter.length)).view(len(x), enter.columns, 8)
    turned: dict[int, Tensor] = {}
    h = x.new_empty(len(x), len(scales))
    for part in parts(runs, enter.number):
        order = _ORDER[part.width]
        if order not in turned:
            turned[order] = x.unflatten(2, (order, -1)).transpose(1, 2).flatten(1)
        h[:, part.ranks] = turned[order] @ _levels(enter, part, x.dtype).T
    h = (h * scales.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    sums: dict[int, Tensor] = {}
    for part in parts(runs, leave.number):
        order = _ORDER[part.width]
        found = h[:, part.ranks] @ _levels(leave, part, x.dtype)
        sums[order] = sums[order].add_(found) if order in sums else found
    y = x.new_zeros(len(x), leave.columns, 8)
    for order, found in sums.items():
        y += found.view(len(x), order, leave.columns, 8 // order).transpose(1, 2).flatten(2)
    return y.flatten(1)[:, : leave.length]


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


def _levels(side: _Side, part: Part, dtype: torch.dtype) -> Tensor:
    """Levels [ranks, 8·columns] of a part, in the order of its width; times the side's scales."""
    rows = side.packed[part.rows].view(part.count, part.width, -1)
    if part.width == 8:  # a look-up yields one level: 3.3 times slower than computing it
        alpha, beta = codebook.CUBIC[7]
        c = rows.float().sub_(127.5)
        levels = c.mul_((c * c).mul_(beta).add_(alpha)).to(dtype)
        if side.scales is not None:
            levels *= side.scales[part.ranks, None, :].to(dtype)
        return levels.flatten(1)
    if part.width == 3:
        low = rows[:, 2:].int() >> _NIBBLES
        index = rows[:, :2].int() | ((low & 15) << 8)
    else:
        index = rows.int()
    levels = torch.embedding(_table(part.width, dtype), index)  # [ranks, order, columns, 8 / order]
    if side.scales is not None:
        levels *= side.scales[part.ranks, None, :, None].to(dtype)
    return levels.flatten(1)


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
