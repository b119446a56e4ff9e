"""Host side of `grouped.py`: tables of deltas, and launches that do not depend on their content."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .config import config
from .decode_plan import (
    DECODE_DTYPES,
    Codes,
    aligned,
    decodable,
    launches_dependents,
    u_table,
)
from .gather import gather_kernel
from .grouped import FIELDS, grouped_expand_kernel, grouped_rows_kernel, grouped_shrink_kernel
from .launch import CHUNK, INTERPRETED, Packed, U, flat, launch
from .layout import canonical, widths_mask
from .prepack import ALIGN, cdiv, pack_u, padded

_FEW = 64  # rows up to which a program takes 8, since each delta has few of them
# Of such a program, registers a thread at most, and how many run on a multiprocessor. What ptxas
# takes by itself, 115 and 94, lets only two run.
_RESOURCES = {"shrink": (80, 3), "expand": (64, 4)}
_RANKS = 64  # of a program that decodes rows of an embedding


class Rows(NamedTuple):
    """Which rows of a batch use which slot; int32 tensors, see `grouped.py`."""

    order: Tensor  # [batch]
    starts: Tensor  # [entries + 1]
    slots: Tensor  # [entries]


class Table:
    """The deltas of one [m, n] matrix by slot; of an `embedding`, rows of U are looked up.

    Attributes:
        data: int64 [slots, 8] on the device, always the same tensor.
        group: of an embedding, elements of U that share a scale, of all deltas in it; 0: all.
        widths: the set of widths that the kernels are compiled for.
        captured: a CUDA graph has recorded launches with this `group` and `widths`, which stay.
    """

    def __init__(self, slots: int, m: int, n: int, device: torch.device, embedding: bool = False):
        self.m, self.n, self.embedding = m, n, embedding
        self.data = torch.zeros(slots, FIELDS.value, dtype=torch.int64, device=device)
        self.group, self.widths, self.captured = 0, canonical(0), False
        self._kept: dict[int, tuple[Tensor, ...]] = {}  # what the addresses point to

    @property
    def total(self) -> int:
        """Slots of h there is room for, in units of 16: every width's ranks are padded."""
        return padded(min(self.m, self.n)) // ALIGN + 7

    def put(
        self, slot: int, packed: Packed | None, dtype: torch.dtype, bias: Tensor | None = None
    ) -> bool:
        """Enter a delta; False: the kernels cannot run it beside the others.

        Args:
            packed: None: it has a bias of its own [m] and nothing else.
            dtype: of x and y, bfloat16 or float16.
        """
        if dtype not in DECODE_DTYPES:
            return False
        fields = [0] * FIELDS.value
        kept: tuple[Tensor, ...] = ()
        if packed is not None:
            widths = canonical(self.widths | widths_mask(b for r in packed.runs for b in r[1:]))
            if not self._fits(packed, dtype, widths):
                return False
            self.group, self.widths = packed.group_sizes[U], widths
            kept = _embedding(packed) if self.embedding else _linear(packed)
            addresses = [t.data_ptr() for t in kept]
            fields[:7] = [*addresses[:3], len(kept[2]), *addresses[3:]]
        if bias is not None:
            kept = *kept, bias
            fields[7] = bias.data_ptr()
        self._kept[slot] = kept
        self.data[slot] = torch.tensor(fields).to(self.data.device)
        return True

    def _fits(self, packed: Packed, dtype: torch.dtype, widths: int) -> bool:
        if not decodable(packed._replace(group_sizes=(packed.group_sizes[0], 0)), dtype):
            return False
        others, group = self.captured or bool(self._kept), packed.group_sizes[U]
        if packed.rank > min(self.m, self.n) or (self.captured and widths != self.widths):
            return False
        return group == self.group or (self.embedding and not others)

    def clear(self, slot: int) -> None:
        if self._kept.pop(slot, None) is not None:
            self.data[slot] = 0


def _linear(packed: Packed) -> tuple[Tensor, ...]:
    """What the fields of a slot point to, in their order without the number of tiles."""
    codes = Codes.of([packed])
    return codes.v, codes.u, codes.tiles, codes.runs, codes.slots, codes.scales


def _embedding(packed: Packed) -> tuple[Tensor, ...]:
    """The same of an embedding."""
    swapped = tuple((count, u, v) for count, v, u in packed.runs)
    table, slots, pads = u_table([(swapped, packed.n)])
    row, places, slot = 0, [], iter(slots)
    for count, _, bits in packed.runs:
        places += [[row + i * bits, bits, next(slot)] for i in range(count)]
        row += count * bits
    places += [[0, 0, pad] for pad in pads]
    device = packed.v.device
    runs, where = (torch.tensor(t, dtype=torch.int32).to(device) for t in (table, places))
    u, ranks = _aligned(packed.u), _aligned(packed.ranks)
    return u, pack_u(packed.v, swapped), where, runs, where, ranks


def _aligned(tensor: Tensor) -> Tensor:
    """The kernels read 16 bytes at a time; tensors inside a file may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGN == 0 else tensor.clone()


def grouped_add(y: Tensor, x: Tensor, table: Table, rows: Rows, bias: Tensor | None = None) -> None:
    """y [..., m] += (x·V̂ᵀ)·Ûᵀ of each row's own delta, in place; x [..., n] of y's dtype.

    Args:
        y: contiguous; the base's product with `bias`, which a delta's own bias replaces.
        rows: of the batch; x has its rows, each one or more times in place.
    """
    columns = padded(cdiv(table.n, 8))
    x = aligned(flat(x), columns)

    def shrink(h: Tensor, where: tuple[Any, ...], tokens: int) -> None:
        launch(
            grouped_shrink_kernel,
            (_programs(x.device, "shrink"),),
            x,
            h,
            *where,
            x.stride(0) // 8,
            table.total,
            columns // ALIGN,
            **_options(table, rows, tokens, x.device, "shrink"),
        )

    _add(y, len(x), table, rows, shrink, table.m, bias)


def grouped_embed(y: Tensor, ids: Tensor, table: Table, rows: Rows) -> None:
    """y [..., n] += Û[ids]·V̂ of each row's own delta, in place; ids int64 [...].

    Every row by itself: its bits do not depend on the batch.
    """
    ids = ids.reshape(-1).contiguous()

    def look_up(h: Tensor, where: tuple[Any, ...], tokens: int) -> None:
        launch(
            grouped_rows_kernel,
            (8 * _programs(ids.device, "expand"),),
            ids,
            h,
            *where,
            2 + (cdiv(table.m, table.group) if table.group else 1),
            cdiv(table.m, 8),
            table.total,
            GROUP=table.group,
            WIDTHS=table.widths,
            R=_RANKS,
            MOST=_most(rows),
            num_warps=1,
        )

    _add(y, len(ids), table, rows, look_up, table.n, None)


def _add(
    y: Tensor,
    count: int,
    table: Table,
    rows: Rows,
    enter: Callable[[Tensor, tuple[Any, ...], int], None],
    outputs: int,
    bias: Tensor | None,
) -> None:
    """h by `enter`, then y += h·Ûᵀ; `CHUNK` rows at a time."""
    length, rest = divmod(count, len(rows.order))
    assert rest == 0 and y.is_contiguous()
    for low in range(0, count, CHUNK):
        high = min(low + CHUNK, count)
        tokens = 8 if high - low <= _FEW else 16
        h = y.new_empty(high - low, 16 * table.total)
        where = table.data, *rows, length, low, high, len(rows.slots)
        enter(h, where, tokens)
        options = _options(table, rows, tokens, y.device, "expand")
        launch(
            grouped_expand_kernel,
            (_programs(y.device, "expand"),),
            h,
            y,
            y if bias is None else bias,
            *where,
            outputs,
            table.total,
            BIASED=bias is not None,
            **options,
            dependent=options["PDL"],
        )


def _options(
    table: Table, rows: Rows, tokens: int, device: torch.device, kernel: str
) -> dict[str, Any]:
    limit = {} if INTERPRETED or tokens > 8 else {"maxnreg": _RESOURCES[kernel][0]}
    return {
        **limit,
        "WIDTHS": table.widths,
        "PTX": not INTERPRETED,
        "PDL": launches_dependents(device),
        "TOKENS": tokens,
        "UNROLL": config(device)[str(tokens)][kernel]["UNROLL"],
        "MOST": _most(rows),
        "num_warps": 8,
    }


def _most(rows: Rows) -> int:
    """A power of two that `entries` do not exceed; 256 for most, to compile one kernel for them."""
    return max(256, triton.next_power_of_2(len(rows.slots)))


@lru_cache(maxsize=64)
def _programs(device: torch.device, kernel: str) -> int:
    """As many as the device runs at a time."""
    if device.type != "cuda":
        return 4  # by turns, in Triton's interpreter
    return _RESOURCES[kernel][1] * torch.cuda.get_device_properties(device).multi_processor_count


def gather(base: Tensor, addresses: Tensor, of_rows: Tensor) -> Tensor:
    """Each row's own vector [rows, n], contiguous, like `base` [n]; see `gather.py`."""
    out = base.new_empty(len(of_rows), len(base))
    block = min(1024, triton.next_power_of_2(len(base)))
    grid = len(of_rows), cdiv(len(base), block)
    launch(gather_kernel, grid, base, out, addresses, of_rows, len(base), BLOCK=block)
    return out
