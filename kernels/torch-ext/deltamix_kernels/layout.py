"""Rank tiles: where the packed codes of up to `TILE` ranks of equal widths lie.

Ranks are stored sorted by width, so equal widths are runs (count, v_bits, u_bits). A kernel handles
one tile at a time, and inside a tile both widths are compile-time constants. The table is int32
[tiles, 8] on the device: first byte row of V and of U, first row of the zero points, first rank,
number of ranks, v_bits, u_bits, and which matrix of a group it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Run = tuple[int, int, int]
Runs = tuple[Run, ...]
FIELDS = 8


def runs_of(flat: Sequence[int]) -> Runs:
    """(count, v_bits, u_bits) triples of a flattened list."""
    return tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def rank_count(runs: Runs) -> int:
    return sum(count for count, _, _ in runs)


def widths_mask(widths: Iterable[int]) -> int:
    """Bit b is set if b is among the widths."""
    return sum(1 << width for width in set(widths))


def tile_rows(runs: Runs, tile: int, matrix: int = 0) -> list[list[int]]:
    """The table of one matrix as a list."""
    rows = []
    v_row = u_row = zero_row = rank = 0
    for count, v_bits, u_bits in runs:
        for start in range(0, count, tile):
            size = min(tile, count - start)
            rows.append([v_row, u_row, zero_row, rank, size, v_bits, u_bits, matrix])
            v_row, u_row = v_row + size * v_bits, u_row + size * u_bits
            zero_row, rank = zero_row + size * max(v_bits, u_bits), rank + size
    return rows


@lru_cache(maxsize=4096)
def tile_table(group: tuple[Runs, ...], tile: int, device: torch.device) -> Tensor:
    """The tables of a group of matrices, one below the other; made once per layout and device."""
    rows = [row for i, runs in enumerate(group) for row in tile_rows(runs, tile, i)]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, FIELDS).to(device)
