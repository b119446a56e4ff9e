"""The packed form of one matrix: ΔW ≈ Û·V̂ as integer codes, scales and per-rank widths.

Four integer tensors hold everything (docs/format.md is normative). With k ranks, g = group size,
Gn = ceil(n/g), Gm = ceil(m/g), and ranks sorted by falling (V width, U width):

    v      uint8 [Σ v_bits, ceil(n/8)]     codes of V̂, one rank after the other
    u      uint8 [Σ u_bits, ceil(m/8)]     codes of Ûᵀ (rank-major too)
    ranks  int16 [k, 1 + Gn + Gm]          v_bits + 16·u_bits | V scales | U scales
    zeros  uint8 [Σ max bits, ceil((Gn+Gm)/8)]   zero points, packed like codes

Scales are bit patterns of bfloat16 in an integer tensor, so that `.to(dtype)` on a model cannot
round them; σ is folded into U's scales. A value is (code − zero)·scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from . import grid, packing
from .errors import DeltaMixError
from .gptq import Rounded

PARTS = ("v", "u", "ranks", "zeros")
DTYPES = {"v": torch.uint8, "u": torch.uint8, "ranks": torch.int16, "zeros": torch.uint8}

Runs = list[tuple[int, int, int]]  # (count, v_bits, u_bits)


def rank_bytes(m: int, n: int, v_bits: int, u_bits: int, group_size: int) -> int:
    """True bytes of one rank: codes of both vectors, scales, zero points and widths."""
    if v_bits == 0 or u_bits == 0:
        return 0  # a rank with an empty side contributes nothing and is not stored
    scale_groups = grid.group_count(n, group_size) + grid.group_count(m, group_size)
    codes = v_bits * -(-n // 8) + u_bits * -(-m // 8)
    return codes + 2 * (1 + scale_groups) + max(v_bits, u_bits) * -(-scale_groups // 8)


def part_shapes(m: int, n: int, runs: Runs, group_size: int) -> dict[str, tuple[int, int]]:
    """Shapes of the four tensors that `runs` imply for an [m, n] matrix."""
    scale_groups = grid.group_count(n, group_size) + grid.group_count(m, group_size)
    return {
        "v": (sum(c * v for c, v, _ in runs), -(-n // 8)),
        "u": (sum(c * u for c, _, u in runs), -(-m // 8)),
        "ranks": (sum(c for c, _, _ in runs), 1 + scale_groups),
        "zeros": (sum(c * max(v, u) for c, v, u in runs), -(-scale_groups // 8)),
    }


def runs_of(ranks: Tensor) -> Runs:
    """Read the widths column of `ranks` [k, 1+G] as runs of equal (v_bits, u_bits).

    Raises:
        DeltaMixError: a width outside 1..8, or ranks that are not sorted.
    """
    if ranks.ndim != 2 or ranks.shape[1] == 0 or ranks.dtype != DTYPES["ranks"]:
        raise DeltaMixError(
            f"the ranks are {ranks.dtype} {list(ranks.shape)}, not int16 [k, 1 + groups]: "
            "the file is damaged"
        )
    pairs = [(int(w) % 16, int(w) // 16) for w in ranks[:, 0].tolist()]
    if any(not (1 <= v <= 8 and 1 <= u <= 8) for v, u in pairs):
        raise DeltaMixError("a rank has a bit width outside 1..8: the file is damaged")
    if pairs != sorted(pairs, reverse=True):
        raise DeltaMixError("ranks are not sorted by width: the file is damaged")
    return [(len(list(same)), v, u) for (v, u), same in groupby(pairs)]


@dataclass
class PackedFactors:
    """Packed ΔW ≈ Û·V̂ of an [m, n] matrix."""

    m: int
    n: int
    group_size: int
    runs: Runs
    v: Tensor
    u: Tensor
    ranks: Tensor
    zeros: Tensor

    @classmethod
    def pack(
        cls, v: Rounded, u: Rounded, v_bits: Tensor, u_bits: Tensor, group_size: int
    ) -> PackedFactors:
        """Sort ranks by width, drop the empty ones, pack. `v_bits`, `u_bits`: int [k]."""
        k, n = v.codes.shape
        m = u.codes.shape[1]
        keep = [i for i in range(k) if v_bits[i] > 0 and u_bits[i] > 0]
        keep.sort(key=lambda i: (-int(v_bits[i]), -int(u_bits[i])))  # stable: σ order within a run
        order = torch.tensor(keep, dtype=torch.long, device=v.codes.device)
        widths = v_bits.to(order.device)[order] + 16 * u_bits.to(order.device)[order]
        scales = grid.scales_to_bits(torch.cat([v.scales[order], u.scales[order]], 1))
        ranks = torch.cat([widths.to(torch.int16)[:, None], scales], 1)
        runs = runs_of(ranks)
        return cls(
            m=m,
            n=n,
            group_size=group_size,
            runs=runs,
            v=packing.pack(v.codes[order], [(c, b) for c, b, _ in runs]),
            u=packing.pack(u.codes[order], [(c, b) for c, _, b in runs]),
            ranks=ranks,
            zeros=packing.pack(
                torch.cat([v.zeros[order], u.zeros[order]], 1),
                [(c, max(b, d)) for c, b, d in runs],
            ),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in PARTS}

    @property
    def rank(self) -> int:
        return self.ranks.shape[0]

    @property
    def nbytes(self) -> dict[str, int]:
        """True bytes: codes ("payload"), scales and zero points ("scales"), widths ("metadata")."""
        widths = 2 * self.rank
        return {
            "payload": self.v.numel() + self.u.numel(),
            "scales": 2 * self.ranks.numel() - widths + self.zeros.numel(),
            "metadata": widths,
        }

    def _side(self, codes: Tensor, length: int, v_side: bool) -> Tensor:
        runs = [(c, v if v_side else u) for c, v, u in self.runs]
        scales, zeros = scales_and_zeros(self.ranks, self.zeros, self.runs)
        split = grid.group_count(self.n, self.group_size)
        part = slice(None, split) if v_side else slice(split, None)
        return grid.dequantize(
            packing.unpack(codes, runs, length), scales[:, part], zeros[:, part], self.group_size
        )

    def right(self) -> Tensor:
        """V̂, float32 [k, n]."""
        return self._side(self.v, self.n, v_side=True)

    def left(self) -> Tensor:
        """Û with σ folded in, transposed: float32 [k, m]."""
        return self._side(self.u, self.m, v_side=False)

    def dense(self) -> Tensor:
        """The delta it stands for, float32 [m, n]."""
        return self.left().T @ self.right()


def scales_and_zeros(ranks: Tensor, zeros: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """Scales float32 [k, Gn+Gm] and zero points uint8 [k, Gn+Gm] of both sides."""
    scales = grid.scales_from_bits(ranks[:, 1:].contiguous())
    points = packing.unpack(zeros, [(c, max(v, u)) for c, v, u in runs], scales.shape[1])
    return scales, points
