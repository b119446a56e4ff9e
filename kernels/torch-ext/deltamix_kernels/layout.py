"""Rank tiles: where the packed codes of up to `TILE` ranks of equal widths lie.

Ranks are stored sorted by width, so equal widths are runs (count, v_bits, u_bits). `dequantize`
handles one tile at a time. The table is int32 [tiles, 7] on the device: first byte row of V and of
U, first row of the zero points, first rank, number of ranks, v_bits, u_bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .persistent import persistent

Run = tuple[int, int, int]
Runs = tuple[Run, ...]


def rank_count(runs: Runs) -> int:
    return sum(count for count, _, _ in runs)


def widths_mask(widths: Iterable[int]) -> int:
    """Bit b is set if b is among the widths."""
    return sum(1 << width for width in set(widths))


# Kernels are compiled for one of two sets of widths: what the default method makes, or all. A set
# for each layer's own would be some thirty variants for a model.
_USUAL, _EVERY = widths_mask((2, 3, 4, 8)), widths_mask(range(1, 9))


def canonical(mask: int) -> int:
    """The smallest set of widths that kernels are compiled for and that has all of `mask`."""
    return _EVERY if mask & ~_USUAL else _USUAL


def padded_rank(runs: Runs) -> int:
    """The next multiple of 8: cuBLAS multiplies rows of whole 16 bytes, others by slow kernels."""
    return -(-rank_count(runs) // 8) * 8


def tile_rows(runs: Runs, tile: int) -> list[list[int]]:
    """The table as a list, up to the padded rank: the last tile has no bits."""
    rows, pads = [], padded_rank(runs) - rank_count(runs)
    v_row = u_row = zero_row = rank = 0
    for count, v_bits, u_bits in (*runs, (pads, 0, 0)):
        for start in range(0, count, tile):
            size = min(tile, count - start)
            rows.append([v_row, u_row, zero_row, rank, size, v_bits, u_bits])
            v_row, u_row = v_row + size * v_bits, u_row + size * u_bits
            zero_row, rank = zero_row + size * max(v_bits, u_bits), rank + size
    return rows


def tile_table(runs: Runs, tile: int, ranks: Tensor) -> Tensor:
    """The table on the device of `ranks`; lives as long as that, as captured graphs need it."""
    tables = _tables.setdefault(ranks, {})
    key = tile, ranks.device
    if key not in tables:

        def make() -> Tensor:
            return torch.tensor(tile_rows(runs, tile), dtype=torch.int32).to(ranks.device)

        tables[key] = persistent(ranks.device, make)
    return tables[key]


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
