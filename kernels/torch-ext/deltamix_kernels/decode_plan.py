"""Decoding with one delta: prepacked codes and launches for up to three matrices of one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DECODE_ROWS, config
from .decode_expand import decode_expand_kernel
from .decode_fused import decode_fused_kernel
from .decode_shrink import decode_shrink_kernel
from .launch import INTERPRETED, Packed, launch
from .layout import Runs, canonical, widths_mask
from .prepack import ALIGN, cdiv, pack_u, pack_v, padded, slots_of, v_runs, width_counts

DECODE_DTYPES = torch.bfloat16, torch.float16  # of x, the base weight and y
_TILE = 8  # ranks of a program of shrink


def decodable(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether the decode kernels know it: Gaussian codebook, one scale a vector, 16-bit floats."""
    return packed.zeros is None and not any(packed.group_sizes) and dtype in DECODE_DTYPES


def token_block(rows: int) -> int:
    """Rows of x that a program takes."""
    return 8 if rows <= 8 else 16


@lru_cache(maxsize=64)
def launches_dependents(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it ends: from Hopper on."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return capable and not INTERPRETED


def aligned(x: Tensor, columns: int) -> Tensor:
    """x [rows, n] of n padded to 8·columns, rows of whole 16 bytes: the kernels load 16 bytes."""
    if x.shape[1] < 8 * columns:
        return F.pad(x, (0, 8 * columns - x.shape[1]))
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()


def v_tiles(runs: Sequence[Runs], columns: int, pads: int) -> list[list[int]]:
    """[first byte / 16, first rank, ranks, bits] of every program of shrink.

    The last ones, of 0 bits, write 0 to the slots that no rank has: expand multiplies those too.
    """
    rows, byte, rank = [], 0, 0
    for count, bits in [*(run for one in runs for run in v_runs(one)), (pads, 0)]:
        for start in range(0, count, _TILE):
            size = min(_TILE, count - start)
            rows.append([byte // ALIGN, rank, size, bits])
            byte, rank = byte + size * bits * columns, rank + size
    return rows


def u_table(runs: Sequence[tuple[Runs, int]]) -> tuple[list[list[list[int]]], list[int], list[int]]:
    """Of (runs, m) of each matrix: `Codes.runs`, every rank's slot, and the slots of no rank."""
    tables, slots, byte, slot = [], [], 0, 0
    for one, m in runs:
        slots += [slot + s for s in slots_of(one)]
        table = [[0] * 4 for _ in range(8)]
        for bits, count in width_counts(one).items():
            size = padded(count)
            table[bits - 1] = [byte // ALIGN, slot // ALIGN, size // ALIGN, 0]
            byte, slot = byte + bits * cdiv(m, 8) * size, slot + size
        tables.append(table)
    return tables, slots, sorted(set(range(slot)) - set(slots))


@dataclass
class Codes:
    """Prepacked codes of matrices that read one input, and the tables that find them.

    Attributes:
        v, u: uint8, see prepack.py; u of all matrices, one behind the other.
        tiles: int32 [tiles, 4], see `v_tiles`.
        runs: int32 [matrices, 8, 4], by width minus one: first code, first slot, slots, all
            divided by 16, and 0.
        slots: int32 [ranks + pads]: where each rank lies in h, then the slots of no rank.
        scales: float32 [ranks + pads]: of V times of U.
        total: slots of h, a multiple of 16.
        columns: byte columns of V, a multiple of 16.
        widths: the set of widths that its kernels are compiled for, bit b for width b.
    """

    v: Tensor
    u: Tensor
    tiles: Tensor
    runs: Tensor
    slots: Tensor
    scales: Tensor
    total: int
    columns: int
    widths: int

    @classmethod
    def of(cls, matrices: Sequence[Packed]) -> Codes:
        """Prepack; every one must be `decodable` and have the same inputs."""
        n, device = matrices[0].n, matrices[0].v.device
        columns = padded(cdiv(n, 8))
        runs, slots, pads = u_table([(p.runs, p.m) for p in matrices])
        tiles = v_tiles([p.runs for p in matrices], columns, len(pads))
        tables = (
            torch.tensor(rows, dtype=torch.int32).to(device) for rows in (tiles, runs, slots + pads)
        )
        scales = [_bfloat(p.ranks[:, 1]) * _bfloat(p.ranks[:, 2]) for p in matrices]
        return cls(
            torch.cat([pack_v(p.v, p.runs, p.n).flatten() for p in matrices]),
            torch.cat([pack_u(p.u, p.runs) for p in matrices]),
            *tables,
            torch.cat([*scales, scales[0].new_zeros(len(pads))]),
            len(slots) + len(pads),
            columns,
            canonical(widths_mask(b for p in matrices for run in p.runs for b in run[1:])),
        )


def _bfloat(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()


class DecodePlan:
    """The deltas of up to three matrices that read one input, ready for up to 64 rows.

    Attributes:
        tiles: settings of the kernels, as in config.py.
    """

    def __init__(
        self, matrices: Sequence[Packed], dtype: torch.dtype, tiles: dict[str, Any] | None = None
    ):
        one, device = matrices[0], matrices[0].v.device
        assert len(matrices) <= 3 and all(p.n == one.n for p in matrices)
        assert all(decodable(p, dtype) for p in matrices)
        self.dtype, self.n, self.lengths = dtype, one.n, [p.m for p in matrices]
        self.codes = Codes.of(matrices)
        self.tiles = tiles or config(device)
        self.dependent = launches_dependents(device)
        if self.dependent:  # such a launch asks for codes before it waits for those before it
            torch.cuda.current_stream(device).synchronize()
        missing = 3 - len(self.lengths)
        self._lengths = [*self.lengths, *self.lengths[:1] * missing]

    def linear(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Every matrix's x·Wᵀ + (x·V̂ᵀ)·Ûᵀ (+ bias) [rows, m] of x [rows <= 64, n].

        Up to 16 rows take two launches, whatever the matrices: shrink, and the base product that
        expand is part of and that begins while shrink runs (H200, a Llama-3-8B layer at one row:
        1.16 times the base alone, 1.47 one after the other).
        """
        rows, without = x.shape[0], sum(b is None for b in biases)
        whole = self.n % 8 == 0 and all(w.is_contiguous() for w in weights)
        if rows <= self.tiles["fused_rows"] and whole and without in (0, len(biases)):
            outputs = [x.new_empty(rows, m) for m in self.lengths]
            x = aligned(x, cdiv(self.n, 8))
            h = self.shrink(x, self.dependent)
            self.fused(h, x, weights, outputs, biases, self.dependent)
        else:
            outputs = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
            self.expand(self.shrink(x), outputs)
        return outputs

    def shrink(self, x: Tensor, dependent: bool = False) -> Tensor:
        """h [rows, slots] of x [rows <= 64, n], with both scales.

        `dependent`: launch before the preceding kernel of the stream ends, and wait for it inside;
        a dependent launch that follows begins as soon as x is there.
        """
        rows, codes = x.shape[0], self.codes
        assert x.dtype == self.dtype and x.shape[1] == self.n and 0 < rows <= DECODE_ROWS
        tokens, x = token_block(rows), aligned(x, codes.columns)
        h = x.new_empty(rows, codes.total)
        launch(
            decode_shrink_kernel,
            (codes.tiles.shape[0], cdiv(rows, tokens)),
            x,
            h,
            codes.tiles,
            codes.v,
            codes.slots,
            codes.scales,
            rows,
            x.stride(0) // 8,
            codes.total // ALIGN,
            codes.columns // ALIGN,
            PDL=dependent,
            num_warps=8,
            **self._options(tokens, "shrink"),
            dependent=dependent,
        )
        return h

    def expand(
        self, h: Tensor, outputs: Sequence[Tensor], add: bool = True, dependent: bool = False
    ) -> None:
        """Add h·Ûᵀ to the outputs [rows, m] of the matrices, or write it (`add=False`).

        `dependent`: launch before the preceding kernel of the stream ends, and wait for it inside.
        """
        rows, codes = outputs[0].shape[0], self.codes
        assert all(y.is_contiguous() and y.dtype == self.dtype for y in outputs)
        tokens = token_block(rows)
        launch(
            decode_expand_kernel,
            (sum(cdiv(m, 64) for m in self.lengths), cdiv(rows, tokens)),
            h,
            *_three(outputs),
            codes.runs,
            codes.u,
            rows,
            codes.total // ALIGN,
            *self._lengths,
            ADD=add,
            PDL=dependent,
            num_warps=8,
            **self._options(tokens, "expand"),
            dependent=dependent,
        )

    def fused(
        self,
        h: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        outputs: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        dependent: bool = False,
        delta: bool = True,
    ) -> None:
        """Write x·Wᵀ + h·Ûᵀ (+ bias) to the outputs [rows <= 16, m], h being `shrink` of x.

        `dependent`: launch before shrink, the preceding kernel of the stream, ends. n must be a
        multiple of 8 and the weights contiguous; all matrices have a bias or none has.
        """
        rows, codes = x.shape[0], self.codes
        assert rows <= 16 and self.n % 8 == 0 and x.stride(1) == 1
        assert x.stride(0) % 8 == 0 and all(w.is_contiguous() for w in weights)
        assert all(y.is_contiguous() and y.dtype == self.dtype for y in outputs)
        given = [b for b in biases or () if b is not None]
        tokens = token_block(rows)
        options = self._options(tokens, "fused")
        launch(
            decode_fused_kernel,
            (sum(cdiv(m, 8 * options["COLUMNS"]) for m in self.lengths),),
            x,
            *_three(weights),
            h,
            *_three(outputs),
            codes.runs,
            codes.u,
            rows,
            x.stride(0) // 8,
            self.n // 8,
            codes.total // ALIGN,
            *self._lengths,
            *_three(given or outputs),
            BIASED=bool(given),
            DELTA=delta,
            PDL=dependent,
            num_warps=options["WARPS"],
            **options,
            dependent=dependent,
        )

    def _options(self, tokens: int, kernel: str) -> dict[str, Any]:
        chosen = self.tiles[str(tokens)][kernel]
        return {"WIDTHS": self.codes.widths, "PTX": not INTERPRETED, "TOKENS": tokens, **chosen}


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, the first one again for those that are missing."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]
