"""Decoding with up to three matrices that read one input: prepacked codes, work lists, launches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .decode_expand import decode_expand_kernel
from .decode_fused import decode_fused_kernel
from .decode_shrink import decode_shrink_kernel
from .launch import INTERPRETED, Packed
from .layout import widths_mask
from .prepack import ALIGN, pack_u, pack_v, padded, slots_of, v_runs, width_counts

MOST_ROWS = 64
MOST_FUSED = 16
_TILE = 8  # ranks of a program of shrink


@dataclass(frozen=True)
class ShrinkTiles:
    """share: eights of warps that share the inputs; unroll: loads of codes in flight a thread."""

    share: int = 1
    unroll: int = 4


@dataclass(frozen=True)
class ExpandTiles:
    """share: eights of warps that share the ranks; unroll: loads of codes in flight a thread."""

    share: int = 1
    unroll: int = 2
    prefetch: bool = True  # ask for all codes of a program first


@dataclass(frozen=True)
class FusedTiles:
    """Warps of a program, loads of base weights in flight a thread and column, byte columns."""

    warps: int = 4
    unroll: int = 4
    columns: int = 1


def _bfloat(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()


@dataclass
class DecodePlan:
    """The deltas of matrices that read one input, ready to be launched for up to 64 rows.

    Matrices must have the Gaussian codebook and one scale a vector. The plan owns h: calls of one
    plan must follow each other on one stream (or be ordered by events).
    """

    matrices: Sequence[Packed]
    dtype: torch.dtype  # of x and y: bfloat16 or float16
    shrink_tiles: ShrinkTiles = field(default_factory=ShrinkTiles)
    expand_tiles: ExpandTiles = field(default_factory=ExpandTiles)
    fused_tiles: FusedTiles = field(default_factory=FusedTiles)

    def __post_init__(self) -> None:
        one, device = self.matrices[0], self.matrices[0].v.device
        assert len(self.matrices) <= 3 and all(p.n == one.n for p in self.matrices)
        assert all(p.zeros is None and not any(p.group_sizes) for p in self.matrices)
        self.n, self.columns = one.n, padded(-(-one.n // 8))
        self.v = torch.cat([pack_v(p.v, p.runs, p.n).flatten() for p in self.matrices])
        self.u = torch.cat([pack_u(p.u, p.runs) for p in self.matrices])
        scales = [_bfloat(p.ranks[:, 1]) * _bfloat(p.ranks[:, 2]) for p in self.matrices]
        self.scales = torch.cat(scales)
        v_tiles, u_runs, slots = self._v_tiles(), [], []
        byte = slot = 0
        for p in self.matrices:
            slots += [slot + s for s in slots_of(p.runs)]
            table = [[0] * 4 for _ in range(8)]
            for bits, count in width_counts(p.runs).items():
                size = padded(count)
                table[bits - 1] = [byte // ALIGN, slot // ALIGN, size // ALIGN, 0]
                byte, slot = byte + bits * -(-p.m // 8) * size, slot + size
            u_runs.append(table)
        self.total = slot
        self.v_tiles, self.u_runs, self.slots = (
            torch.tensor(rows, dtype=torch.int32).to(device) for rows in (v_tiles, u_runs, slots)
        )
        # Zeros, because no program writes the slots between two runs and expand reads them.
        self.h = torch.zeros(MOST_ROWS, self.total, dtype=self.dtype, device=device)
        self.v_widths = widths_mask(v for p in self.matrices for _, v, _ in p.runs)
        self.u_widths = widths_mask(u for p in self.matrices for _, _, u in p.runs)

    def retiled(
        self,
        shrink: ShrinkTiles | None = None,
        expand: ExpandTiles | None = None,
        fused: FusedTiles | None = None,
    ) -> DecodePlan:
        """A plan of the same codes with other tiles."""
        other = copy(self)
        other.shrink_tiles = shrink or self.shrink_tiles
        other.expand_tiles = expand or self.expand_tiles
        other.fused_tiles = fused or self.fused_tiles
        return other

    def _v_tiles(self) -> list[list[int]]:
        """[first byte / 16, first rank, ranks, bits] of every program of shrink."""
        rows, byte, rank = [], 0, 0
        for count, bits in (run for p in self.matrices for run in v_runs(p.runs)):
            for start in range(0, count, _TILE):
                size = min(_TILE, count - start)
                rows.append([byte // ALIGN, rank, size, bits])
                byte, rank = byte + size * bits * self.columns, rank + size
        return rows

    def _options(self, rows: int, pdl: bool) -> dict[str, Any]:
        """`pdl`: programmatic dependent launch, which the interpreter does not know."""
        pdl = pdl and not INTERPRETED
        return {"PTX": not INTERPRETED, "PDL": pdl, "TOKENS": 8 if rows <= 8 else 16}

    def aligned(self, x: Tensor) -> Tensor:
        """x [rows, n] padded to all byte columns, where 16-byte loads need it."""
        assert x.dtype == self.dtype and x.shape[1] == self.n and 0 < len(x) <= MOST_ROWS
        wanted = 8 * self.columns
        if self.n == wanted and x.stride(1) == 1 and x.stride(0) % 8 == 0:
            return x
        return F.pad(x, (0, wanted - self.n)).contiguous()

    def shrink(self, x: Tensor, pdl: bool = False) -> Tensor:
        """h [64, slots] of x [rows <= 64, n], with both scales; rows past x's are left alone.

        `pdl`: let a launch with `pdl` that follows begin at once; of no consequence to others.
        """
        rows, tiles, x = len(x), self.shrink_tiles, self.aligned(x)
        decode_shrink_kernel[(len(self.v_tiles), triton.cdiv(rows, MOST_FUSED))](
            x,
            self.h,
            self.v_tiles,
            self.v,
            self.slots,
            self.scales,
            rows,
            x.stride(0) // 8,
            self.total // ALIGN,
            self.columns // ALIGN,
            WIDTHS=self.v_widths,
            SHARE=tiles.share,
            UNROLL=tiles.unroll,
            num_warps=8 * tiles.share,
            **self._options(rows, pdl),
        )
        return self.h

    def expand(self, outputs: Sequence[Tensor], add: bool = True, pdl: bool = False) -> None:
        """Add h·Ûᵀ to the outputs [rows, m] of the matrices, or write it (`add=False`).

        `pdl`: launch before the preceding kernel of the stream ends, and wait for it inside.
        """
        rows, tiles = len(outputs[0]), self.expand_tiles
        assert all(y.is_contiguous() and y.dtype == self.dtype for y in outputs)
        full, lengths = self._three(outputs)
        programs = sum(triton.cdiv(p.m, 64) for p in self.matrices)
        decode_expand_kernel[(programs, triton.cdiv(rows, MOST_FUSED))](
            self.h,
            *full,
            self.u_runs,
            self.u,
            rows,
            self.total // ALIGN,
            *lengths,
            ADD=add,
            WIDTHS=self.u_widths,
            PREFETCH=tiles.prefetch and not INTERPRETED,
            SHARE=tiles.share,
            UNROLL=tiles.unroll,
            num_warps=8 * tiles.share,
            **self._options(rows, pdl),
            **({"launch_pdl": True} if pdl else {}),
        )

    def fused(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        outputs: Sequence[Tensor],
        delta: bool = True,
        pdl: bool = False,
    ) -> None:
        """Write x·Wᵀ + h·Ûᵀ to the outputs [rows <= 16, m], after `shrink` of the same x.

        `pdl`: launch before shrink, the preceding kernel of the stream, ends. n must be a multiple
        of 8 and the weights contiguous.
        """
        rows, tiles = len(x), self.fused_tiles
        assert rows <= MOST_FUSED and self.n % 8 == 0 and x.stride(1) == 1
        assert x.stride(0) % 8 == 0 and all(w.is_contiguous() for w in weights)
        assert all(y.is_contiguous() and y.dtype == self.dtype for y in outputs)
        full, lengths = self._three(outputs)
        programs = sum(triton.cdiv(p.m, 8 * tiles.columns) for p in self.matrices)
        decode_fused_kernel[(programs,)](
            x,
            *self._three(weights)[0],
            self.h,
            *full,
            self.u_runs,
            self.u,
            rows,
            x.stride(0) // 8,
            self.n // 8,
            self.total // ALIGN,
            *lengths,
            DELTA=delta,
            WIDTHS=self.u_widths,
            WARPS=tiles.warps,
            COLUMNS=tiles.columns,
            UNROLL=tiles.unroll,
            num_warps=tiles.warps,
            **self._options(rows, pdl),
            **({"launch_pdl": True} if pdl else {}),
        )

    def _three(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The tensors, the first one again for those that are missing, and all matrices' m."""
        missing = 3 - len(tensors)
        lengths = [p.m for p in self.matrices] + [self.matrices[0].m] * missing
        return [*tensors, *[tensors[0]] * missing], lengths
