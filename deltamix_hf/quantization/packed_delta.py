"""`PackedDelta`: ΔW ≈ Û·V̂ as integer codes, scales and per-rank widths.

Of one matrix, or of all experts of a 3-D parameter, one behind the other. `packed_layout` has the
tensors. What belongs to one expert is a slice, so nothing is copied to read it; what belongs to
some of them is gathered with a few operations, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import bitpacking, packed_layout, uniform
from .gptq import Rounded
from .packed_layout import GroupSizes, Runs
from .quantizer import Quantizer, quantizer_of


@dataclass
class PackedDelta:
    """Packed ΔW ≈ Û·V̂ of an [m, n] matrix, or of the experts of a 3-D parameter."""

    m: int  # outputs and inputs, of every expert alike
    n: int
    group_sizes: GroupSizes
    runs: Runs  # of equal ranks; empty for experts, whose own `split` reads
    v: Tensor  # this and the other tensors: see `packed_layout`
    u: Tensor
    ranks: Tensor
    zeros: Tensor | None = None  # None with the Gaussian codebook
    counts: Tensor | None = None  # None for one matrix

    @classmethod
    def pack(cls, v: Rounded, u: Rounded) -> PackedDelta:
        """Sort ranks by width, drop the empty ones, pack: V̂ [k, n] and Ûᵀ [k, m]."""
        group_sizes = v.group_size, u.group_size
        v_bits, u_bits = v.bits.to(v.codes.device), u.bits.to(v.codes.device)
        order = (16 * v_bits + u_bits).argsort(descending=True, stable=True)  # σ order within a run
        order = order[((v_bits > 0) & (u_bits > 0))[order]]
        widths = (v_bits + 16 * u_bits)[order] + 256 * packed_layout.exponent_of(group_sizes)
        scales = uniform.scales_to_bits(torch.cat([v.scales[order], u.scales[order]], 1))
        ranks = torch.cat([widths.to(torch.int16)[:, None], scales], 1)
        runs, _ = packed_layout.layout_of(ranks, v.group_size)
        plain = {"v": v.codes[order], "u": u.codes[order]}
        if v.zeros is not None and u.zeros is not None:
            plain["zeros"] = torch.cat([v.zeros[order], u.zeros[order]], 1)
        own = packed_layout.packed_runs(runs)
        packed = {part: bitpacking.pack(codes, own[part]) for part, codes in plain.items()}
        n, m = v.codes.shape[1], u.codes.shape[1]
        return cls(m, n, group_sizes, runs, ranks=ranks, **packed)

    @classmethod
    def join(cls, experts: Sequence[PackedDelta | None]) -> PackedDelta:
        """Join the deltas of all experts, None for one without a rank; one at least has some."""
        kept = [packed for packed in experts if packed is not None]
        counts = [0 if packed is None else packed.rank for packed in experts]
        joined: dict[str, Any] = {
            part: torch.cat([packed.tensors[part] for packed in kept]) for part in kept[0].tensors
        }
        joined["counts"] = torch.tensor(counts, dtype=torch.int32, device=kept[0].v.device)
        return cls(kept[0].m, kept[0].n, kept[0].group_sizes, [], **joined)

    @classmethod
    def checked(
        cls,
        m: int,
        n: int,
        group_size: int,
        tensors: Mapping[str, Tensor],
        experts: int | None = None,
    ) -> PackedDelta:
        """Take the tensors, by part, of an [m, n] matrix or of `experts` of them.

        `group_size` is V's, and U's where the ranks do not say otherwise; `v` and `u` may be meta.
        Raises DeltaMixError if they are not those of such matrices, or hold what no compressor
        writes.
        """
        runs, group_sizes = packed_layout.checked_layout(m, n, group_size, tensors, experts)
        return cls(m, n, group_sizes, runs if experts is None else [], **tensors)

    def names(self, prefix: str) -> dict[str, str]:
        """Name the tensors by part, as they are stored for the module or parameter `prefix`."""
        return packed_layout.part_names(prefix, self.quantizer, self.counts is not None)

    @property
    def quantizer(self) -> Quantizer:
        return quantizer_of(self.zeros)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = packed_layout.parts(self.quantizer, self.counts is not None)
        return {part: getattr(self, part) for part in held}

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The packed tensors and the layout, in the order the ops take them."""
        flat = [number for run in self.runs for number in run]
        layout = flat if self.counts is None else self.counts
        return self.v, self.u, self.ranks, self.zeros, layout, self.m, self.n, [*self.group_sizes]

    @classmethod
    def of_op(cls, *arguments: Any) -> PackedDelta:
        """Put together what `op_arguments` gave."""
        v, u, ranks, zeros, layout, m, n, group_sizes = arguments
        counts = layout if isinstance(layout, Tensor) else None
        flat = layout if counts is None else []
        runs = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
        return cls(m, n, tuple(group_sizes), runs, v, u, ranks, zeros, counts)

    def to(self, device: torch.device) -> PackedDelta:
        """Copy to `device`; from pinned memory to a GPU without waiting."""
        later = device.type == "cuda"
        return self._changed(lambda tensor: tensor.to(device, non_blocking=later))

    def move(self, device: torch.device) -> None:
        """Move to `device`, in place."""
        vars(self).update(self.to(device).tensors)

    def pinned(self) -> PackedDelta:
        """Copy to page-locked host memory; needs a GPU."""
        return self._changed(Tensor.pin_memory)

    def untied(self) -> PackedDelta:
        """Wrap the same memory in other tensors: views of theirs do not keep ours alive."""
        return self._changed(lambda tensor: tensor.data)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PackedDelta:
        changed: Any = {part: change(tensor) for part, tensor in self.tensors.items()}
        return replace(self, **changed)

    @property
    def rank(self) -> int:
        return self.ranks.shape[0]

    @property
    def nbytes(self) -> dict[str, int]:
        """Count the bytes by kind, as `bytes_by_kind`."""
        sizes = {part: t.numel() * t.element_size() for part, t in self.tensors.items()}
        return packed_layout.bytes_by_kind(sizes, self.rank)

    def _side(self, side: str, length: int) -> Tensor:
        """Decode V̂ or Ûᵀ of one matrix, float32 [k, length]."""
        number, runs = ("v", "u").index(side), packed_layout.packed_runs(self.runs)[side]
        groups = packed_layout.scale_counts(self.m, self.n, self.group_sizes)
        codes = bitpacking.unpack(getattr(self, side), runs, length)
        scales = uniform.scales_from_bits(self.ranks[:, 1:].contiguous()).split(groups, 1)[number]
        points = self.zeros
        if points is not None:
            points = packed_layout.zero_points(points, self.runs, sum(groups))
            points = points.split(groups, 1)[number]
        bits, group_size = packed_layout.row_bits(runs, codes), self.group_sizes[number]
        return self.quantizer.decode(codes, scales, points, bits, group_size)

    def right(self) -> Tensor:
        """Decode V̂ of one matrix, float32 [k, n]."""
        return self._side("v", self.n)

    def left(self) -> Tensor:
        """Decode Û of one matrix with σ folded in, transposed: float32 [k, m]."""
        return self._side("u", self.m)

    def dense(self) -> Tensor:
        """Multiply out the delta of one matrix, float32 [m, n]."""
        return self.left().T @ self.right()

    def split(self) -> list[PackedDelta | None]:
        """Give every expert its own, as views, None for one without a rank; a matrix is itself."""
        if self.counts is None:
            return [self]
        each, quantizer = self.ranks.split(self.counts.tolist()), self.quantizer
        layouts = [packed_layout.layout_of(ranks, self.group_sizes[0])[0] for ranks in each]
        size = self.m, self.n
        shapes = [
            packed_layout.part_shapes(*size, runs, self.group_sizes, quantizer) for runs in layouts
        ]
        pieces = {
            part: self.tensors[part].split([shape[part][0] for shape in shapes])
            for part in packed_layout.parts(quantizer)
        }
        found: list[PackedDelta | None] = []
        for number, runs in enumerate(layouts):
            own = {part: piece[number] for part, piece in pieces.items()}
            found.append(PackedDelta(*size, self.group_sizes, runs, **own) if runs else None)
        return found

    def chosen(self, experts: Tensor) -> tuple[PackedDelta, Tensor]:
        """Gather all ranks of some experts (int64 [H]), sorted by width like those of one matrix.

        Returns the K ranks, and whose each is: int64 [K] in 0 .. H − 1.
        """
        assert self.counts is not None
        counts, words = self.counts.long(), self.ranks[:, 0].long() & 255
        sizes = counts[experts]
        owner = torch.arange(len(experts), device=sizes.device).repeat_interleave(sizes)
        rank = _ranges((counts.cumsum(0) - counts)[experts], sizes)
        widths = {"v": words % 16, "u": words // 16}
        widths["zeros"] = torch.maximum(widths["v"], widths["u"])
        keys = (16 * widths["v"] + widths["u"])[rank]
        order = keys.argsort(descending=True, stable=True)
        rank = rank[order]
        found, runs = torch.unique_consecutive(keys[order], return_counts=True)
        own: dict[str, Any] = {"ranks": self.ranks[rank]}
        for part, width in widths.items():
            packed = self.tensors.get(part)
            if packed is not None:
                own[part] = packed[_ranges((width.cumsum(0) - width)[rank], width[rank])]
        triples = [(c, k // 16, k % 16) for c, k in zip(runs.tolist(), found.tolist(), strict=True)]
        return PackedDelta(self.m, self.n, self.group_sizes, triples, **own), owner[order]


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ... of every range, one range after the other; int64."""
    ends = sizes.cumsum(0)
    steps = torch.arange(int(ends[-1]) if len(ends) else 0, device=starts.device)
    return steps + (starts - ends + sizes).repeat_interleave(sizes)
