"""Decoding with up to three matrices that read one input: prepacked codes, work lists, launches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from .decode_expand import decode_expand_kernel
from .decode_shrink import decode_shrink_kernel
from .launch import INTERPRETED, Packed
from .layout import widths_mask
from .prepack import ALIGN, pack_u, pack_v, padded, u_runs, v_runs

MOST_ROWS = 64
_ROWS_AT_ONCE = 16  # 32 spill in expand


@dataclass(frozen=True)
class ShrinkTiles:
    """R ranks and C byte columns a warp and step, S warps, `splits` programs share the columns."""

    R: int = 32
    C: int = 32
    S: int = 4
    splits: int = 4
    stages: int = 2


@dataclass(frozen=True)
class ExpandTiles:
    """C byte columns and R ranks a warp and step, S warps, about this many programs a launch."""

    R: int = 32
    C: int = 16
    S: int = 4
    programs: int = 264
    stages: int = 2


def _bfloat(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()


@dataclass
class DecodePlan:
    """The deltas of matrices that read one input, ready to be launched for up to 64 rows.

    Matrices must have the Gaussian codebook and one scale a vector. The plan owns its workspaces:
    calls of one plan must follow each other on one stream (or be ordered by events).
    """

    matrices: Sequence[Packed]
    dtype: torch.dtype  # of x and y: bfloat16 or float16
    shrink_tiles: ShrinkTiles = field(default_factory=ShrinkTiles)
    expand_tiles: ExpandTiles = field(default_factory=ExpandTiles)

    def __post_init__(self) -> None:
        one, device = self.matrices[0], self.matrices[0].v.device
        assert len(self.matrices) <= 3 and all(p.n == one.n for p in self.matrices)
        assert all(p.zeros is None and not any(p.group_sizes) for p in self.matrices)
        self.n, self.columns = one.n, padded(-(-one.n // 8))
        self.v = torch.cat([pack_v(p.v, p.runs, p.n).flatten() for p in self.matrices])
        self.u = torch.cat([pack_u(p.u, p.runs) for p in self.matrices])
        scales = [_bfloat(p.ranks[:, 1]) * _bfloat(p.ranks[:, 2]) for p in self.matrices]
        self.scales = torch.cat(scales)
        counts = [c for p in self.matrices for c, _ in u_runs(p.runs)]
        firsts = [0, *accumulate(padded(c) for c in counts)]
        slots = [torch.arange(c) + f for c, f in zip(counts, firsts, strict=False)]
        self.slots = torch.cat(slots).to(torch.int32).to(device)
        self.total = firsts[-1]
        # Zeros, because no program writes the slots between two runs and expand reads them.
        self.h = torch.zeros(MOST_ROWS, self.total, dtype=self.dtype, device=device)
        self.v_widths = widths_mask(v for p in self.matrices for _, v, _ in p.runs)
        self.u_widths = widths_mask(u for p in self.matrices for _, _, u in p.runs)
        self._lay_out()

    def retiled(self, shrink: ShrinkTiles, expand: ExpandTiles) -> DecodePlan:
        """A plan of the same codes with other tiles."""
        other = copy(self)
        other.shrink_tiles, other.expand_tiles = shrink, expand
        other._lay_out()
        return other

    def _lay_out(self) -> None:
        """Make the work lists and the counters."""
        device, shrink, expand = self.v.device, self._shrink_rows(), self._expand_rows()
        # a power of two: fewer variants to compile
        self.most = triton.next_power_of_2(max(row[9] for row in expand))
        self.v_tiles, self.u_tiles = (
            torch.tensor(rows, dtype=torch.int32).to(device) for rows in (shrink, expand)
        )
        blocks = MOST_ROWS // 8
        self.arrived = torch.zeros(
            blocks * max(len(shrink), len(expand)), dtype=torch.int32, device=device
        )
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def _shrink_rows(self) -> list[list[int]]:
        """[first byte / 16, first rank, ranks, bits] of every tile."""
        rows, byte, rank = [], 0, 0
        for count, bits in (run for p in self.matrices for run in v_runs(p.runs)):
            for start in range(0, count, self.shrink_tiles.R):
                size = min(self.shrink_tiles.R, count - start)
                rows.append([byte // ALIGN, rank, size, bits])
                byte, rank = byte + size * bits * self.columns, rank + size
        return rows

    def _expand_rows(self) -> list[list[int]]:
        """What a program of expand does, and which others share its outputs.

        [first byte, first slot, slots and slots of the whole run, all in units of 16; bits is
        between], byte columns, first byte column, matrix, number among the programs that share the
        outputs and how many they are; three unused.
        """
        tiles, rows, byte, slot = self.expand_tiles, [], 0, 0
        share_bytes = self.u.numel() / tiles.programs
        for i, p in enumerate(self.matrices):
            columns, shares = -(-p.m // 8), []
            for count, bits in u_runs(p.runs):
                size, step = padded(count), tiles.S * tiles.R
                wanted = max(1, round(count * bits * tiles.C / share_bytes))
                share = -(-size // wanted // step) * step
                for start in range(0, size, share):
                    here = min(share, size - start)
                    shares.append([byte + start, slot + start, here, bits, size])
                byte, slot = byte + bits * columns * size, slot + size
            for column in range(0, columns, tiles.C):
                for part, (first, at, here, bits, size) in enumerate(shares):
                    units = [(first + column * size) // 16, at // 16, here // 16, bits, size // 16]
                    rows.append([*units, columns, column, i, part, len(shares), 0, 0])
        return rows

    def _rows_at_once(self, rows: int) -> int:
        assert 0 < rows <= MOST_ROWS
        return min(_ROWS_AT_ONCE, max(8, triton.next_power_of_2(rows)))

    def _workspace(self, m: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Partial sums of shrink and of expand."""
        if m * blocks not in self._parts:
            s, e = self.shrink_tiles, self.expand_tiles
            shrink = len(self.v_tiles) * s.splits * s.R if s.splits > 1 else 0
            expand = len(self.u_tiles) * 8 * e.C if self.most > 1 else 0
            self._parts[m * blocks] = tuple(
                torch.empty(max(1, size * m * blocks), dtype=torch.float32, device=self.v.device)
                for size in (shrink, expand)
            )
        return self._parts[m * blocks]

    def shrink(self, x: Tensor, pdl: bool = False) -> Tensor:
        """h [64, slots] of x [rows <= 64, n], with both scales; rows past x's are left alone."""
        rows, tiles = len(x), self.shrink_tiles
        assert x.stride(1) == 1 and x.shape[1] == self.n and x.dtype == self.dtype
        m = self._rows_at_once(rows)
        blocks, step = triton.cdiv(rows, m), tiles.S * tiles.C
        share = triton.cdiv(triton.cdiv(self.columns, tiles.splits), step) * step
        splits = triton.cdiv(self.columns, share)
        decode_shrink_kernel[(len(self.v_tiles), splits, blocks)](
            x,
            self.h,
            self._workspace(m, blocks)[0],
            self.arrived,
            self.v_tiles,
            self.v,
            self.slots,
            self.scales,
            rows,
            self.n,
            x.stride(0),
            self.total,
            self.columns,
            share,
            EVEN=self.n == 8 * self.columns and self.columns % step == 0,
            WIDTHS=self.v_widths,
            LOOKUP=not INTERPRETED,
            PDL=pdl,
            SPLITS=splits,
            M=m,
            S=tiles.S,
            R=tiles.R,
            C=tiles.C,
            num_warps=tiles.S,
            num_stages=tiles.stages,
        )
        return self.h

    def expand(self, outputs: Sequence[Tensor], add: bool = True, pdl: bool = False) -> None:
        """Add h·Ûᵀ to the outputs [rows, m] of the matrices, or write it (`add=False`).

        `pdl`: launch before the preceding kernel of the stream ends, and wait for it inside.
        """
        rows, tiles = len(outputs[0]), self.expand_tiles
        assert all(y.is_contiguous() and y.dtype == self.dtype for y in outputs)
        m = self._rows_at_once(rows)
        blocks = triton.cdiv(rows, m)
        full = [*outputs, outputs[0], outputs[0]][:3]
        options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        decode_expand_kernel[(len(self.u_tiles), blocks)](
            self.h,
            *full,
            self._workspace(m, blocks)[1],
            self.arrived,
            self.u_tiles,
            self.u,
            rows,
            self.total,
            *(y.shape[1] for y in full),
            ADD=add,
            WIDTHS=self.u_widths,
            LOOKUP=not INTERPRETED,
            PDL=pdl,
            MOST=self.most,
            M=m,
            S=tiles.S,
            R=tiles.R,
            C=tiles.C,
            num_warps=tiles.S,
            num_stages=tiles.stages,
            **options,
        )
