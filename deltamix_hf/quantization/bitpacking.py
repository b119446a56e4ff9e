"""Bit packing of quantized factors, every width from 0 to 8.

A factor is stored rank-major: `k` ranks of `n` codes each (`n` is the number of input features for
V and of output features for U, which is stored transposed). Every rank has one width `b`; equal
neighbours form *runs* `(count, bits)`.

Layout (normative). A packed factor is a uint8 matrix `[sum_i b_i, ceil(n / 8)]`. Byte column `c`
holds the elements `8c .. 8c+7` of every rank, so a slice of columns is a slice of the vector and
tensor parallelism shards a packed factor without unpacking it. A rank of width `b` owns `b`
consecutive byte rows; a 0-bit rank owns none. A run of `r` ranks is therefore the view
`[r, b, ceil(n / 8)]`.

Inside a rank the width is split into planes of 8, 4, 2 and 1 bits, largest first
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). The first plane holds the HIGH bits of the code,
later planes the lower ones: a 3-bit code is `(plane2 << 1) | plane1`. A plane of width `p` has `p`
byte rows; element `j` of a byte column lies in byte row `j * p // 8` at shift `j * p % 8`, so no
code straddles a byte and every width decodes with shifts and masks alone. Elements past `n` are 0.

How it is fast. The eight codes of a byte column, one per byte, are one little-endian int64 word
(this module assumes a little-endian host, as safetensors does). Packing and unpacking gather or
spread the bits of whole int64 tensors, which vectorises: 2-bit ranks unpack at 3e9 codes/s on one
Zen 4 core, where writing one strided uint8 slice per element reached 1e9.
"""

from collections.abc import Iterator, Sequence

import torch

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


def runs_of(bits: torch.Tensor | Sequence[int]) -> list[tuple[int, int]]:
    """Run-length form `[(count, bits), ...]` of a per-rank width vector `[k]`."""
    bits = torch.as_tensor(bits, dtype=torch.int64).cpu()
    if bits.ndim != 1:
        raise ValueError(f"widths must be a vector, got shape {tuple(bits.shape)}")
    values, counts = torch.unique_consecutive(bits, return_counts=True)
    return list(zip(counts.tolist(), values.tolist(), strict=True))


def packed_rows(runs: Runs) -> int:
    """Number of byte rows of a packed factor: the sum of all widths."""
    return sum(count * bits for count, bits in runs)


def pack(codes: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Pack uint8 `codes` `[k, n]` into uint8 `[sum_i b_i, ceil(n / 8)]`.

    Raises ValueError if the runs do not cover `k` ranks or a code does not fit its width.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [k, n], got {codes.dtype} {tuple(codes.shape)}")
    ranks, n = codes.shape
    _check_runs(runs)
    if sum(count for count, _ in runs) != ranks:
        raise ValueError(f"runs {list(runs)} do not cover the {ranks} ranks of the codes")
    columns = (n + 7) // 8
    words = codes.new_zeros(ranks, columns, dtype=torch.int64)
    words.view(torch.uint8)[:, :n] = codes
    packed = codes.new_empty(packed_rows(runs), columns)
    row = byte_row = 0
    for count, bits in runs:
        run = codes[row : row + count]
        if bits < 8 and run.numel() and int(run.max()) >> bits:
            raise ValueError(
                f"code {int(run.max())} does not fit {bits} bits (ranks {row} to {row + count - 1})"
            )
        target = packed[byte_row : byte_row + count * bits].view(count, bits, columns)
        plane_row, low = 0, bits
        for plane in _PLANES[bits]:
            low -= plane
            _gather_plane(
                words[row : row + count], plane, low, target[:, plane_row : plane_row + plane]
            )
            plane_row += plane
        row, byte_row = row + count, byte_row + count * bits
    return packed


def unpack(packed: torch.Tensor, runs: Runs, n: int) -> torch.Tensor:
    """Codes uint8 `[k, n]` of a packed factor uint8 `[sum_i b_i, ceil(n / 8)]`.

    Raises ValueError if the packed shape does not follow from `runs` and `n`.
    """
    columns = (n + 7) // 8
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
            plane_row = 0
            for plane in _PLANES[bits]:
                source = part[:, plane_row : plane_row + plane]
                if plane_row == 0:
                    _spread_plane(source, plane, out, scratch[0, : len(part)])
                else:
                    lower = scratch[1, : len(part)]
                    _spread_plane(source, plane, lower, scratch[0, : len(part)])
                    out.bitwise_left_shift_(plane).bitwise_or_(lower)
                plane_row += plane
    return words.view(torch.uint8)[:, :n].contiguous()


def unpack_columns(packed: torch.Tensor, runs: Runs, index: torch.Tensor) -> torch.Tensor:
    """`unpack(packed, runs, n)[:, index]` uint8 `[k, t]`, reading only the columns asked for.

    `index` is int64 `[t]` with values in `0 .. n - 1`; an embedding look-up reads U this way. An
    index past the last byte column is an IndexError (a device assert on CUDA). Padding elements
    between `n` and the end of the last byte column read as code 0.
    """
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [t], got {index.dtype} {tuple(index.shape)}")
    columns = packed.shape[-1]
    _check_packed(packed, runs, columns)
    codes = packed.new_zeros(sum(count for count, _ in runs), len(index))
    column, element = index // 8, index % 8
    for first, bits, rows in _run_views(packed, runs):
        out = codes[first : first + len(rows)]
        plane_row = 0
        for plane in _PLANES[bits]:
            byte_row = plane_row + element * plane // 8
            found = rows[:, byte_row, column]  # [r, t]
            found = found >> (element * plane % 8).to(torch.uint8)
            out.bitwise_left_shift_(plane).bitwise_or_(found & ((1 << plane) - 1))
            plane_row += plane
    return codes


def _run_views(packed: torch.Tensor, runs: Runs) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first rank, bits, byte rows `[r, bits, columns]`) of every run."""
    rank = byte_row = 0
    for count, bits in runs:
        rows = packed[byte_row : byte_row + count * bits]
        yield rank, bits, rows.unflatten(0, (count, bits))
        rank, byte_row = rank + count, byte_row + count * bits


def _spread_plane(
    rows: torch.Tensor, plane: int, words: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Spread byte rows `[r, plane, c]` into `words` `[r, c]`, one code per byte."""
    if plane == 8:
        words.view(torch.uint8).unflatten(1, (-1, 8)).copy_(rows.transpose(1, 2))
        return
    words.copy_(rows[:, 0])
    for i in range(1, plane):
        words.bitwise_or_(scratch.copy_(rows[:, i]).bitwise_left_shift_(i * 64 // plane))
    for shift, _, mask in _SPREAD[plane]:
        torch.bitwise_left_shift(words, shift, out=scratch)
        words.bitwise_or_(scratch).bitwise_and_(mask)


def _gather_plane(words: torch.Tensor, plane: int, low: int, rows: torch.Tensor) -> None:
    """Inverse of `_spread_plane` for the `plane` bits above bit `low` of every code in `words`."""
    if plane == 8:
        rows.copy_(words.view(torch.uint8).unflatten(1, (-1, 8)).transpose(1, 2))
        return
    gathered = (words >> low) & _SPREAD[plane][-1][2]
    for shift, mask, _ in reversed(_SPREAD[plane]):
        gathered = (gathered | (gathered >> shift)) & mask
    for i in range(plane):
        rows[:, i] = (gathered >> (i * 64 // plane)) & 255


def _check_runs(runs: Runs) -> None:
    for count, bits in runs:
        if count < 0 or bits not in _PLANES:
            raise ValueError(f"run ({count}, {bits}): need count >= 0 and 0 <= bits <= 8")


def _check_packed(packed: torch.Tensor, runs: Runs, columns: int) -> None:
    _check_runs(runs)
    expected = (packed_rows(runs), columns)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ValueError(
            f"packed factor must be uint8 {list(expected)} for these runs, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
