"""A part of a packed matrix: some of its rows and columns, packed again.

Tensor parallelism needs it. Rows of W are elements of Û, columns those of V̂, and both are stored
rank-major: so a part of ΔW has all ranks, with shorter vectors.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from . import packing
from .packed import PackedFactors, scale_counts, zero_points


def cut(packed: PackedFactors, rows: range, columns: range) -> PackedFactors:
    """Those rows and columns of an [m, n] matrix: the very values, as [len(rows), len(columns)].

    Where a part begins inside a scale group, its groups become smaller, and scales are repeated.

    Args:
        rows: of outputs, within 0..m, step 1, not empty.
        columns: of inputs, within 0..n, likewise.
    """
    if (len(rows), len(columns)) == (packed.m, packed.n):
        return packed
    v_group, v_index = _groups(columns, packed.group_sizes[0])
    u_group, u_index = _groups(rows, packed.group_sizes[1])
    v_groups, _ = scale_counts(packed.m, packed.n, packed.group_sizes)
    kept = torch.tensor(v_index + [v_groups + i for i in u_index], device=packed.ranks.device)
    scales = packed.ranks[:, 1:][:, kept]
    zeros = packed.zeros
    if zeros is not None:
        points = zero_points(zeros, packed.runs, packed.ranks.shape[1] - 1)[:, kept]
        zeros = packing.pack(points, [(c, max(v, u)) for c, v, u in packed.runs])
    return replace(
        packed,
        m=len(rows),
        n=len(columns),
        group_sizes=(v_group, u_group),
        v=_codes(packed.v, [(c, v) for c, v, _ in packed.runs], packed.n, columns),
        u=_codes(packed.u, [(c, u) for c, _, u in packed.runs], packed.m, rows),
        ranks=torch.cat([packed.ranks[:, :1], scales], 1),
        zeros=zeros,
    )


def _codes(codes: Tensor, runs: list[tuple[int, int]], length: int, part: range) -> Tensor:
    if len(part) == length:
        return codes
    plain = packing.unpack(codes, runs, length)
    return packing.pack(plain[:, part.start : part.stop].contiguous(), runs)


def _groups(part: range, size: int) -> tuple[int, list[int]]:
    """The group size of a part, and for each of its groups the group of the whole it lies in."""
    if size == 0:
        return 0, [0]
    own = gcd(size, part.start)
    return own, [first // size for first in range(part.start, part.stop, own)]
