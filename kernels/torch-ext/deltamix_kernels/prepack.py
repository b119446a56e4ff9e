"""Packed codes in the order that the decode kernels read, and back; the file format is unchanged.

V keeps its byte rows, but byte column c holds the elements c, columns + c, ..., 7·columns + c of a
vector instead of 8c to 8c + 7: then element j of all byte columns meets a contiguous part of x.

U is transposed: all ranks of one width become [byte row of the width][byte column][rank], so that
ranks, over which expand sums, are contiguous.

Byte columns of V and ranks of a width of U are padded to `ALIGN`, the bytes of one load.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby

import torch
from torch import Tensor

from .layout import Runs

ALIGN = 16


def cdiv(count: int, size: int) -> int:
    """Like `triton.cdiv`, a device function too: 8 % of a block's host time in a profile."""
    return -(-count // size)


def padded(count: int) -> int:
    return cdiv(count, ALIGN) * ALIGN


def _fields(bits: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(element j, byte row, shift in it, mask, shift in the code) of every plane of a width."""
    row, rest = 0, bits
    for plane in (8, 4, 2, 1):
        if bits & plane:
            rest -= plane
            for j in range(8):
                yield j, row + j * plane // 8, j * plane % 8, (1 << plane) - 1, rest
            row += plane


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """uint8 [k, bits, columns] -> codes uint8 [k, columns, 8]."""
    codes = packed.new_zeros(packed.shape[0], packed.shape[2], 8)
    for j, row, shift, mask, place in _fields(bits):
        codes[:, :, j] |= ((packed[:, row] >> shift) & mask) << place
    return codes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_codes`."""
    packed = codes.new_zeros(codes.shape[0], bits, codes.shape[1])
    for j, row, shift, mask, place in _fields(bits):
        packed[:, row] |= ((codes[:, :, j] >> place) & mask) << shift
    return packed


def v_runs(runs: Runs) -> list[tuple[int, int]]:
    """(count, v_bits), neighbours of one width merged."""
    return [(sum(r[0] for r in some), bits) for bits, some in groupby(runs, key=lambda r: r[1])]


def u_runs(runs: Runs) -> list[tuple[int, int]]:
    """(count, u_bits), neighbours of one width merged."""
    return [(sum(r[0] for r in some), bits) for bits, some in groupby(runs, key=lambda r: r[2])]


def pack_v(v: Tensor, runs: Runs, n: int) -> Tensor:
    """uint8 [Σ v_bits, ceil(n/8)] as stored -> [Σ v_bits, columns], columns a multiple of 16."""
    columns, first, done = padded(cdiv(n, 8)), 0, []
    for count, bits in v_runs(runs):
        codes = unpack_codes(v[first : first + count * bits].view(count, bits, -1), bits)
        codes = torch.nn.functional.pad(codes.flatten(1), (0, 8 * (columns - v.shape[1])))
        codes = codes.view(count, 8, columns).transpose(1, 2)
        done.append(pack_codes(codes, bits).view(-1, columns))
        first += count * bits
    return torch.cat(done) if done else v.new_empty(0, columns)


def unpack_v(packed: Tensor, runs: Runs, n: int) -> Tensor:
    """The inverse of `pack_v`."""
    columns, first, done = cdiv(n, 8), 0, []
    for count, bits in v_runs(runs):
        codes = unpack_codes(packed[first : first + count * bits].view(count, bits, -1), bits)
        codes = codes.transpose(1, 2).reshape(count, -1)[:, : 8 * columns]
        done.append(pack_codes(codes.view(count, columns, 8), bits).view(-1, columns))
        first += count * bits
    return torch.cat(done) if done else packed.new_empty(0, columns)


def width_counts(runs: Runs) -> dict[int, int]:
    """Ranks of each u_bits, in the order of `pack_u`."""
    found: dict[int, int] = {}
    for count, bits in u_runs(runs):
        found[bits] = found.get(bits, 0) + count
    return found


def slots_of(runs: Runs) -> list[int]:
    """Where `pack_u` puts each rank, every width's ranks padded."""
    counts = width_counts(runs)
    free = dict(zip(counts, accumulate(map(padded, counts.values()), initial=0), strict=False))
    slots = []
    for count, bits in u_runs(runs):
        slots += range(free[bits], free[bits] + count)
        free[bits] += count
    return slots


def pack_u(u: Tensor, runs: Runs) -> Tensor:
    """uint8 [Σ u_bits, columns] as stored -> all widths [u_bits, columns, padded(count)], flat."""
    first, parts = 0, {bits: [] for bits in width_counts(runs)}
    for count, bits in u_runs(runs):
        parts[bits].append(u[first : first + count * bits].view(count, bits, -1))
        first += count * bits
    done = []
    for some in parts.values():
        run = torch.cat(some).permute(1, 2, 0)
        done.append(
            torch.nn.functional.pad(run, (0, padded(run.shape[2]) - run.shape[2])).flatten()
        )
    return torch.cat(done) if done else u.new_empty(0)


def unpack_u(packed: Tensor, runs: Runs, m: int) -> Tensor:
    """The inverse of `pack_u`."""
    columns, first, parts = cdiv(m, 8), 0, {}
    for bits, count in width_counts(runs).items():
        size = bits * columns * padded(count)
        run = packed[first : first + size].view(bits, columns, -1)[:, :, :count]
        parts[bits] = run.permute(2, 0, 1)
        first += size
    done, used = [], dict.fromkeys(parts, 0)
    for count, bits in u_runs(runs):
        done.append(parts[bits][used[bits] : used[bits] + count].reshape(-1, columns))
        used[bits] += count
    return torch.cat(done) if done else packed.new_empty(0, columns)
