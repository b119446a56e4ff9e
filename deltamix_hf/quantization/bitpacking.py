"""Bit packing of quantized factors, every width from 0 to 8 (docs/format.md is normative).

A factor is stored rank-major: `k` ranks of `n` codes each (`n` is the number of input features for
V and of output features for U, which is stored transposed). Every rank has one width `b`; equal
neighbours form *runs* `(count, bits)`. Packed it is a uint8 matrix `[sum_i b_i, ceil(n / 8)]`: byte
column `c` holds the elements `8c .. 8c+7` of every rank, so a slice of columns is a slice of the
vector and tensor parallelism shards a packed factor without unpacking it. A rank of width `b` owns
`b` consecutive byte rows, so a run of `r` ranks is the view `[r, b, ceil(n / 8)]`.

Inside a rank the width is split into planes of 8, 4, 2 and 1 bits, largest and high bits first: a
3-bit code is `(plane2 << 1) | plane1`. A plane of width `p` has `p` byte rows; element `j` of a
byte column lies in byte row `j * p // 8` at shift `j * p % 8`, so no code straddles a byte and
every width decodes with shifts and masks alone. Elements past `n` are 0.

How it is fast. The eight codes of a byte column, one per byte, are one little-endian int64 word
(this module assumes a little-endian host, as safetensors does). Packing and unpacking gather or
spread the bits of whole int64 tensors, which vectorises: 2-bit ranks unpack at 3e9 codes/s on one
Zen 4 core, where writing one strided uint8 slice per element reached 1e9.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Runs = Sequence[tuple[int, int]]

_PLANES = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

# Steps (shift, mask before, mask after) that spread the packed bits of a plane of width p to one
# code per byte, coarsest first; packing walks them backwards. Byte row i of the plane sits at bit
# i * 64 / p of the word before the first step.
_SPREAD = {
    1: (
        (28, 0x00000000000000FF, 0x0000000F0000000F),
        (14, 0x0000000F0000000F, 0x0003000300030003),
        (7, 0x0003000300030003, 0x0101010101010101),
    ),
    2: (
        (12, 0x000000FF000000FF, 0x000F000F000F000F),
        (6, 0x000F000F000F000F, 0x0303030303030303),
    ),
    4: ((4, 0x00FF00FF00FF00FF, 0x0F0F0F0F0F0F0F0F),),
}

# Words handled at once on the CPU: three int64 buffers of this size stay in a 1 MiB L2 cache.
_CPU_CHUNK = 1 << 15


def packed_rows(runs: Runs) -> int:
    """Sum widths: a factor's byte rows; ValueError for a negative count or a width outside 0..8."""
    for count, bits in runs:
        if count < 0 or bits not in _PLANES:
            raise ValueError(f"run ({count}, {bits}): need count >= 0 and 0 <= bits <= 8")
    return sum(count * bits for count, bits in runs)


def pack(codes: Tensor, runs: Runs) -> Tensor:
    """Pack uint8 `codes` `[k, n]` into uint8 `[sum_i b_i, ceil(n / 8)]`.

    Raises ValueError if the runs do not cover `k` ranks or a code does not fit its width.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [k, n], got {codes.dtype} {tuple(codes.shape)}")
    ranks, n = codes.shape
    if sum(count for count, _ in runs) != ranks:
        raise ValueError(f"runs {list(runs)} do not cover the {ranks} ranks of the codes")
    packed = codes.new_empty(packed_rows(runs), -(-n // 8))
    words = codes.new_zeros(ranks, packed.shape[1], dtype=torch.int64)
    words.view(torch.uint8)[:, :n] = codes
    for first, bits, rows in _run_views(packed, runs):
        run = slice(first, first + len(rows))
        largest = int(codes[run].max()) if codes[run].numel() else 0
        if largest >> bits:
            raise ValueError(
                f"code {largest} does not fit {bits} bits (ranks {first} to {run.stop - 1})"
            )
        low = bits
        for plane, target in _planes(rows):
            low -= plane
            _gather_plane(words[run], plane, low, target)
    return packed


def unpack(packed: Tensor, runs: Runs, n: int) -> Tensor:
    """Codes uint8 `[k, n]` of a packed factor uint8 `[sum_i b_i, ceil(n / 8)]`.

    Raises ValueError if the packed shape does not follow from `runs` and `n`.
    """
    columns = -(-n // 8)
    _check_packed(packed, runs, columns)
    ranks = sum(count for count, _ in runs)
    words = packed.new_empty(ranks, columns, dtype=torch.int64)
    chunk = max(1, _CPU_CHUNK // max(columns, 1)) if packed.device.type == "cpu" else max(ranks, 1)
    scratch = words.new_empty(2, min(chunk, ranks), columns)
    for first, bits, rows in _run_views(packed, runs):
        if bits == 0:
            words[first : first + len(rows)] = 0
            continue
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            out = words[first + start : first + start + len(part)]
            spread, lower = scratch[:, : len(part)]
            (plane, source), *others = _planes(part)
            _spread_plane(source, plane, out, spread)
            for plane, source in others:
                _spread_plane(source, plane, lower, spread)
                out.bitwise_left_shift_(plane).bitwise_or_(lower)
    return words.view(torch.uint8)[:, :n].contiguous()


def unpack_columns(packed: Tensor, runs: Runs, index: Tensor) -> Tensor:
    """`unpack(packed, runs, n)[:, index]` uint8 `[k, t]`, reading only the columns asked for.

    `index` is int64 `[t]` with values in `0 .. n - 1`; an embedding look-up reads U this way. An
    index past the last byte column is an IndexError (a device assert on CUDA). Padding elements
    between `n` and the end of the last byte column read as code 0.
    """
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [t], got {index.dtype} {tuple(index.shape)}")
    _check_packed(packed, runs, packed.shape[-1])
    codes = packed.new_zeros(sum(count for count, _ in runs), len(index))
    column, element = index // 8, index % 8
    for first, _, rows in _run_views(packed, runs):
        out = codes[first : first + len(rows)]
        for plane, source in _planes(rows):
            found = source[:, element * plane // 8, column]  # [r, t]
            found = found >> (element * plane % 8).to(torch.uint8)
            out.bitwise_left_shift_(plane).bitwise_or_(found & ((1 << plane) - 1))
    return codes


def _run_views(packed: Tensor, runs: Runs) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first rank, bits, byte rows `[r, bits, columns]`) of every run."""
    rank = byte_row = 0
    for count, bits in runs:
        rows = packed[byte_row : byte_row + count * bits]
        yield rank, bits, rows.unflatten(0, (count, bits))
        rank, byte_row = rank + count, byte_row + count * bits


def _planes(rows: Tensor) -> list[tuple[int, Tensor]]:
    """Split `rows` `[r, bits, columns]` into planes: (width, byte rows `[r, width, columns]`)."""
    widths = _PLANES[rows.shape[1]]
    return list(zip(widths, rows.split(widths, 1), strict=True)) if widths else []


def _spread_plane(rows: Tensor, plane: int, words: Tensor, scratch: Tensor) -> None:
    """Spread byte rows `[r, plane, c]` into `words` int64 `[r, c]`, one code per byte."""
    if plane == 8:
        words.view(torch.uint8).unflatten(1, (-1, 8)).copy_(rows.transpose(1, 2))
        return
    words.copy_(rows[:, 0])
    for i in range(1, plane):
        words.bitwise_or_(scratch.copy_(rows[:, i]).bitwise_left_shift_(i * 64 // plane))
    for shift, _, mask in _SPREAD[plane]:
        torch.bitwise_left_shift(words, shift, out=scratch)
        words.bitwise_or_(scratch).bitwise_and_(mask)


def _gather_plane(words: Tensor, plane: int, low: int, rows: Tensor) -> None:
    """Inverse of `_spread_plane` for the `plane` bits above bit `low` of every code in `words`."""
    if plane == 8:
        rows.copy_(words.view(torch.uint8).unflatten(1, (-1, 8)).transpose(1, 2))
        return
    gathered = (words >> low) & _SPREAD[plane][-1][2]
    for shift, mask, _ in reversed(_SPREAD[plane]):
        gathered = (gathered | (gathered >> shift)) & mask
    for i in range(plane):
        rows[:, i] = (gathered >> (i * 64 // plane)) & 255


def _check_packed(packed: Tensor, runs: Runs, columns: int) -> None:
    """Raise a ValueError unless `packed` is uint8 `[sum of widths, columns]`."""
    expected = [packed_rows(runs), columns]
    if packed.dtype != torch.uint8 or list(packed.shape) != expected:
        raise ValueError(
            f"packed factor must be uint8 {expected} for these runs, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
