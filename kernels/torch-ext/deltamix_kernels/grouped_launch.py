"""Host side of `grouped.py`: tables of deltas, and launches that do not depend on their content."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .config import config
from .gather import gather_kernel
from .grouped import (
    FIELDS,
    grouped_expand_kernel,
    grouped_rows_kernel,
    grouped_shrink_kernel,
)
from .launch import INTERPRETED, Packed, U, V, columns_at_once, flat, launch, split_columns
from .layout import tile_table

TILE = 16  # ranks of a tile, for few rows and for many: a delta has one tile table
_ALIGNED = 16  # bytes


class Rows(NamedTuple):
    """Which rows of a batch use which slot; int32 tensors, see `grouped.py`."""

    order: Tensor  # [batch]
    starts: Tensor  # [entries + 1]
    slots: Tensor  # [entries]


class Table:
    """The deltas of one [m, n] matrix by slot.

    Attributes:
        data: int64 [slots, 6] on the device, always the same tensor.
        group: elements of U that share a scale, of all deltas in it; 0: all.
        captured: a CUDA graph has recorded launches with this `group`, which stays.
    """

    def __init__(self, slots: int, m: int, n: int, device: torch.device):
        self.m, self.n = m, n
        self.data = torch.zeros(slots, FIELDS.value, dtype=torch.int64, device=device)
        self.group = 0
        self.captured = False
        self._kept: dict[int, tuple[Tensor, ...]] = {}  # what the addresses point to

    @property
    def total(self) -> int:
        """Ranks there is room for in the partial sums."""
        return min(self.m, self.n)

    def put(self, slot: int, packed: Packed | None, bias: Tensor | None = None) -> bool:
        """Enter a delta; False: the kernels cannot run it beside the others.

        `packed` None: it has a bias of its own [m] and nothing else.
        """
        if packed is not None:
            if not packed.groupable or packed.rank > self.total:
                return False
            if (self._kept or self.captured) and packed.group_sizes[U] != self.group:
                return False
            self.group = packed.group_sizes[U]
        device = self.data.device
        kept: tuple[Tensor, ...] = ()
        fields = [0] * FIELDS.value
        if packed is not None:
            tiles = tile_table((packed.runs,), TILE, device)
            kept = tuple(_aligned(t) for t in (packed.v, packed.u, packed.ranks, tiles))
            fields[:5] = [*(t.data_ptr() for t in kept), len(tiles)]
        if bias is not None:
            kept = *kept, bias
            fields[5] = bias.data_ptr()
        self._kept[slot] = kept
        self.data[slot] = torch.tensor(fields, device=device)
        return True

    def clear(self, slot: int) -> None:
        if self._kept.pop(slot, None) is not None:
            self.data[slot] = 0


def _aligned(tensor: Tensor) -> Tensor:
    """The kernels read 16 bytes at a time; tensors inside a file may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def grouped_add(y: Tensor, x: Tensor, table: Table, rows: Rows, bias: Tensor | None = None) -> None:
    """y [..., m] += (x·V̂ᵀ)·Ûᵀ of each row's own delta, in place; x [..., n].

    Args:
        y: contiguous; the base's product with `bias`, which a delta's own bias replaces.
        rows: of the batch; x has its rows, each one or more times in place.
    """
    x = flat(x)
    length = _length(x, rows)
    count, n = x.shape
    assert n == table.n and y.is_contiguous()
    if x.numel() == 0:
        return
    chosen = config(x.device, count, "grouped_shrink")
    split, splits = split_columns(x.device, count, n, kernel="grouped_shrink")
    h = x.new_empty(splits, count, table.total, dtype=torch.float32)
    blocks = _row_programs(chosen, count)
    grid = _tile_programs(chosen, table), splits * blocks, len(rows.slots)
    launch(
        grouped_shrink_kernel,
        grid,
        x,
        h,
        table.data,
        *rows,
        length,
        count,
        n,
        table.total,
        splits,
        x.stride(0),
        _stride(table),
        triton.cdiv(n, 8),
        GROUP=table.group,
        SPLIT=split,
        WIDEN=INTERPRETED,
        M=chosen["M"],
        R=TILE,
        C=chosen["C"],
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    _expand(h, y, table, rows, length, U, bias)


def grouped_embed(y: Tensor, ids: Tensor, table: Table, rows: Rows) -> None:
    """y [..., n] += Û[ids]·V̂ of each row's own delta, in place; ids int64 [...]."""
    ids = ids.reshape(-1, 1).contiguous()
    length, count = _length(ids, rows), len(ids)
    assert y.is_contiguous()
    if count == 0:
        return
    chosen = config(ids.device, count, "grouped_rows")
    h = ids.new_empty(1, count, table.total, dtype=torch.float32)
    grid = _tile_programs(chosen, table), _row_programs(chosen, count), len(rows.slots)
    launch(
        grouped_rows_kernel,
        grid,
        ids,
        h,
        table.data,
        *rows,
        length,
        table.total,
        _stride(table),
        triton.cdiv(table.m, 8),
        GROUP=table.group,
        M=chosen["M"],
        R=TILE,
        num_warps=chosen["num_warps"],
    )
    _expand(h, y, table, rows, length, V, None)


def _expand(
    h: Tensor, y: Tensor, table: Table, rows: Rows, length: int, side: int, bias: Tensor | None
) -> None:
    splits, count, total = h.shape
    group = table.group if side == U else 0
    chosen = config(h.device, count, "grouped_expand")
    c = columns_at_once(chosen["C"], group)
    outputs = table.m if side == U else table.n
    columns = triton.cdiv(outputs, 8)
    grid = triton.cdiv(columns, c), _row_programs(chosen, count), len(rows.slots)
    launch(
        grouped_expand_kernel,
        grid,
        h,
        y,
        y if bias is None else bias,
        table.data,
        *rows,
        length,
        count,
        outputs,
        total,
        splits,
        _stride(table),
        1 + side,
        columns,
        SIDE=side,
        BIAS=bias is not None,
        GROUP=group,
        WIDEN=INTERPRETED,
        M=chosen["M"],
        R=TILE,
        C=c,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )


def gather(base: Tensor, addresses: Tensor, of_rows: Tensor) -> Tensor:
    """Each row's own vector [rows, n], contiguous, like `base` [n]; see `gather.py`."""
    out = base.new_empty(len(of_rows), len(base))
    block = min(1024, triton.next_power_of_2(len(base)))
    grid = len(of_rows), triton.cdiv(len(base), block)
    launch(gather_kernel, grid, base, out, addresses, of_rows, len(base), BLOCK=block)
    return out


def _length(x: Tensor, rows: Rows) -> int:
    """Rows of x for each row of the batch."""
    length, rest = divmod(len(x), len(rows.order))
    assert rest == 0
    return length


def _stride(table: Table) -> int:
    """Row length of `ranks`: a width word, V's scale, U's scales."""
    return 2 + (triton.cdiv(table.m, table.group) if table.group else 1)


def _tile_programs(chosen: dict[str, int], table: Table) -> int:
    return min(chosen["programs"], triton.cdiv(table.total, TILE))


def _row_programs(chosen: dict[str, int], rows: int) -> int:
    return min(chosen["row_programs"], triton.cdiv(rows, chosen["M"]))
