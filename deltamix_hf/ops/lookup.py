"""The delta product on a CPU in plain torch: packed bytes become levels by table look-up.

It runs where the native op (`native.py`) cannot.

Unpacking codes and computing levels are a dozen small tensor operations a width, and at one token
their overhead is all the time there is. A byte of a plane holds 8/p codes of p bits, so one look-up
in a table [256, 8/p] of levels does both at once. Widths 2 and 3 share one look-up: of 3 bits, a
byte of the high plane and four bits of the low one make a number of twelve bits, and both give four
levels. At 8 bits a byte is one code, and computing its level is 3.3 times faster than a look-up.

So there are at most three parts on a side, each with its own order of levels: byte row, byte
column, element in the byte. Instead of putting levels in order, x is permuted on the way in and y
on the way out.

All is computed in float32: products in bfloat16 with levels that are new at every call made oneDNN
keep 600 MB for good (SmolLM2-135M).

Widths 2, 3, 4 and 8, Gaussian codebook, one scale a vector except for U of embeddings: what the
default method makes. Levels of a U with groups are multiplied by their scales as they are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization import gaussian as codebook
from ..quantization import uniform
from ..quantization.packed_delta import PackedDelta

Widths = tuple[tuple[int, int, int], ...]
Product = Callable[[Tensor, Tensor], Tensor]  # of [M, k] and [k, n]

# Width -> byte rows that a look-up result belongs to: 8 / order elements come from one byte.
_ORDER = {2: 2, 3: 2, 4: 4, 8: 8}
_TWO_BITS = 4096  # where the 2-bit entries begin, after the 3-bit ones


@dataclass(frozen=True)
class OrderedRanks:
    """Ranks whose levels come in one order, as slices or indices, in the order of the pieces."""

    order: int
    pieces: tuple[tuple[int, slice | Tensor], ...]  # a width and the byte rows of its ranks
    ranks: slice | Tensor


@dataclass(frozen=True)
class _Side:
    """Packed codes of one factor, `number` 1 for V and 2 for U, and its scales.

    `scales` float32 [k, byte columns], or None: one scale a vector, applied to h.
    """

    packed: Tensor
    number: int
    length: int
    runs: Widths
    scales: Tensor | None = None


def _right(packed: PackedDelta) -> _Side:
    return _Side(packed.v, 1, packed.n, tuple(packed.runs))


def _left(packed: PackedDelta, scales: Tensor | None = None) -> _Side:
    return _Side(packed.u, 2, packed.m, tuple(packed.runs), scales)


def supported(packed: PackedDelta) -> bool:
    v, u = packed.group_sizes
    fits = packed.zeros is None and v == 0 and u % 8 == 0
    return fits and all(v in _ORDER and u in _ORDER for _, v, u in packed.runs)


def low_rank(x: Tensor, packed: PackedDelta, transposed: bool) -> Tensor:
    """Multiply x [M, n]: (x·V̂ᵀ)·Ûᵀ [M, m] in x's dtype; `transposed`: x [M, m], (x·Û)·V̂ [M, n]."""
    scales, by_column = uniform.scales_from_bits(packed.ranks[:, 1:].contiguous()), None
    if u_group := packed.group_sizes[1]:
        by_column = scales[:, 1:].repeat_interleave(u_group // 8, 1)[:, : packed.u.shape[1]]
        scales = scales[:, :1]
    enter, leave = _right(packed), _left(packed, by_column)
    if transposed:
        enter, leave = leave, enter
    h = _enter(x, enter)
    for scale in scales.unbind(1):  # in this order, as `shared` applies them
        h = h * scale
    return _leave(h, leave).to(x.dtype)


def shared(x: Tensor, packed: Sequence[PackedDelta]) -> list[Tensor]:
    """Multiply x [M, n] by several deltas, one scale a vector: [M, m] of each, in x's dtype.

    It is one look-up of all codes of V: at one token the overhead of small tensor operations is
    most of a delta's time.
    """
    runs = sum((tuple(p.runs) for p in packed), ())
    h = _enter(x, _Side(torch.cat([p.v for p in packed]), 1, packed[0].n, runs))
    h = h * uniform.scales_from_bits(torch.cat([p.ranks[:, 1] for p in packed]))
    found = []
    for part, p in zip(h.split([p.rank for p in packed], 1), packed, strict=True):
        scales = uniform.scales_from_bits(p.ranks[:, 2].contiguous())
        found.append(_leave(part * scales, _left(p)).to(x.dtype))
    return found


def times_right(h: Tensor, packed: PackedDelta) -> Tensor:
    """Multiply h float32 [M, k], V's scales included: h·V̂, float32 [M, n].

    A row's bits do not depend on the others: `row_by_row`.
    """
    return _leave(h, _right(packed), row_by_row)


def row_by_row(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply x [M, k] by [k, n], every row for itself: its bits are the same for any M.

    Llava finds its image tokens by comparing rows of embeddings. 512 rows of 128 x 2048 take 14 ms,
    one product of all 3 ms.
    """
    rows = [matrix.T.mv(row.clone()) for row in x]  # a copy begins where vectors are aligned
    return torch.stack(rows) if rows else x @ matrix


def levels(packed: Tensor, runs: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Decode (count, width) runs to levels float32 [k, length], without scales, in order.

    For ranks that are not the same from call to call, whose `parts` are not worth working out.
    Bytes are put in order before they are looked up, which is four times less to move.
    """
    found = torch.empty(sum(run[0] for run in runs), 8 * packed.shape[1])
    row = rank = 0
    for count, width in runs:
        rows, out = packed[row : row + count * width], found[rank : rank + count]
        row, rank = row + count * width, rank + count
        if width == 8:
            ordered = rows.view(count, 8, -1).transpose(1, 2)
            out.view(count, -1, 8).copy_(_eight_bits(ordered))
        else:
            entries = _entries(rows, width, slice(None)).transpose(1, 2)
            _look_up(_ORDER[width], entries.contiguous(), out.view(-1))
    return found[:, :length]


def _enter(x: Tensor, enter: _Side) -> Tensor:
    """x [M, length] times the codes: float32 [M, k]."""
    rows, columns = len(x), enter.packed.shape[1]
    x = x.float()
    if enter.length < 8 * columns:
        x = F.pad(x, (0, 8 * columns - enter.length))
    h = x.new_empty(rows, sum(run[0] for run in enter.runs))
    for part in parts(enter.runs, enter.number):
        turned = x.view(rows, columns, part.order, 8 // part.order).transpose(1, 2).flatten(1)
        found = turned @ _levels(enter, part).T
        if isinstance(part.ranks, slice):
            h[:, part.ranks] = found
        else:
            h.index_copy_(1, part.ranks, found)
    return h


def _leave(h: Tensor, leave: _Side, product: Product = torch.matmul) -> Tensor:
    rows, columns = len(h), leave.packed.shape[1]
    y = h.new_zeros(rows, columns, 8)
    for part in parts(leave.runs, leave.number):
        found = product(_take(h, 1, part.ranks), _levels(leave, part))
        turned = found.view(rows, part.order, columns, 8 // part.order).transpose(1, 2)
        y.view(rows, columns, part.order, 8 // part.order).add_(turned)
    return y.flatten(1)[:, : leave.length]


@lru_cache(maxsize=8192)
def parts(runs: Widths, side: int) -> tuple[OrderedRanks, ...]:
    """Group the ranks of `runs` by the order of their levels on one side (1: V, 2: U)."""
    rows: dict[int, list[int]] = {}
    ranks: dict[int, list[int]] = {}
    row = rank = 0
    for run in runs:
        count, width = run[0], run[side]
        rows.setdefault(width, []).extend(range(row, row + count * width))
        ranks.setdefault(width, []).extend(range(rank, rank + count))
        row, rank = row + count * width, rank + count
    found = []
    for order in (8, 4, 2):
        widths = [width for width in (8, 4, 3, 2) if width in rows and _ORDER[width] == order]
        if widths:
            pieces = tuple((w, _index(rows[w], torch.int32)) for w in widths)
            found.append(OrderedRanks(order, pieces, _index([r for w in widths for r in ranks[w]])))
    return tuple(found)


def _index(numbers: list[int], dtype: torch.dtype = torch.int64) -> slice | Tensor:
    """A slice if the numbers are consecutive."""
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, dtype=dtype)


def _take(tensor: Tensor, dim: int, index: slice | Tensor) -> Tensor:
    """Some rows or columns; `tensor[index]` with a tensor takes twice as long."""
    if isinstance(index, Tensor):
        return tensor.index_select(dim, index)
    return tensor[index] if dim == 0 else tensor[:, index]


def _levels(side: _Side, part: OrderedRanks) -> Tensor:
    """Levels [ranks, 8·columns] of a part, in its own order; times the side's scales."""
    if part.order == 8:
        _, rows = part.pieces[0]  # alone: no other width has this order
        levels = _eight_bits(_take(side.packed, 0, rows)).view(-1, 8, side.packed.shape[1], 1)
    else:
        found = [_entries(side.packed, *piece) for piece in part.pieces]
        index = found[0] if len(found) == 1 else torch.cat(found)
        levels = _look_up(part.order, index)
    if side.scales is not None:  # levels are [ranks, order, columns, 8 / order]
        levels *= side.scales[part.ranks, None, :, None]
    return levels.flatten(1)


def _eight_bits(codes: Tensor) -> Tensor:
    """c·(alpha + beta·c²) of centred codes."""
    c = codes.float().sub_(127.5)
    return torch.addcmul(_ALPHA, c, c, value=codebook.CUBIC[7][1]).mul_(c)


def _entries(packed: Tensor, width: int, index: slice | Tensor) -> Tensor:
    """Where in `_table` the levels of each byte are: int32 [ranks, order, columns]."""
    rows = _take(packed, 0, index).view(-1, width, packed.shape[1])
    if width == 4:
        return rows.int()
    if width == 2:
        return rows.int().add_(_TWO_BITS)
    low = (rows[:, 2:] >> _NIBBLES).bitwise_and_(15)
    return torch.add(rows[:, :2].int(), low, alpha=256)


_ALPHA = torch.tensor(codebook.CUBIC[7][0], dtype=torch.float32, device="cpu")
_NIBBLES = torch.tensor([0, 4], dtype=torch.uint8, device="cpu")[:, None]


def _look_up(order: int, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Levels [*index.shape, 8 / order] of entries; `out`, flat, takes them too.

    Of a vector of 16-byte elements `index_select` reads one in 0.8 ns, of a matrix of four columns
    it copies a row in 2.4 ns.
    """
    wide = torch.complex64 if order == 4 else torch.complex128
    wide_out = None if out is None else out.view(wide)
    found = torch.index_select(_table(order).view(wide).view(-1), 0, index.view(-1), out=wide_out)
    return found.view(torch.float32).view(*index.shape, -1)


@cache
def _table(order: int) -> Tensor:
    """Levels [entries, 8 / order] of every entry."""
    with torch.device("cpu"):  # whatever is the default where it is first wanted
        if order == 4:
            return _of_bytes(4)
        numbers, element = torch.arange(_TWO_BITS)[:, None], torch.arange(4)
        codes = ((numbers >> (element * 2)) & 3) << 1 | ((numbers >> (8 + element)) & 1)
        three = codebook.decode(codes.to(torch.uint8), torch.tensor(3))
        return torch.cat([three, _of_bytes(2)])


def _of_bytes(width: int) -> Tensor:
    """Levels [256, 8 / width] of the codes in a byte."""
    shifts = torch.arange(8 // width) * width
    codes = (torch.arange(256)[:, None] >> shifts) & ((1 << width) - 1)
    return codebook.decode(codes.to(torch.uint8), torch.tensor(width))
