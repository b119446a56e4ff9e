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

from . import bitpacking, uniform
from .gptq import Rounded
from .packed_layout import (
    GroupSizes,
    Runs,
    bytes_by_kind,
    checked_layouts,
    exponent_of,
    layout_of,
    part_names,
    parts,
    row_bits,
    scale_counts,
    zero_points,
)
from .quantizer import Quantizer, quantizer_of


@dataclass
class PackedDelta:
    """Packed ΔW ≈ Û·V̂ of an [m, n] matrix, or of the experts of a 3-D parameter.

    Attributes:
        m, n: outputs and inputs, of every expert alike.
        group_sizes: elements of V and of U that share a scale; 0: the whole vector.
        runs: (count, v_bits, u_bits) of equal ranks; empty for experts, whose own `split` reads.
        v, u, ranks, zeros, counts: the tensors of `packed_layout`. `zeros` is None with the
            Gaussian codebook, `counts` for one matrix.
    """

    m: int
    n: int
    group_sizes: GroupSizes
    runs: Runs
    v: Tensor
    u: Tensor
    ranks: Tensor
    zeros: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def pack(cls, v: Rounded, u: Rounded) -> PackedDelta:
        """Sort ranks by width, drop the empty ones, pack: V̂ [k, n] and Ûᵀ [k, m]."""
        k, n = v.codes.shape
        m = u.codes.shape[1]
        v_bits, u_bits, group_sizes = v.bits, u.bits, (v.group_size, u.group_size)
        keep = [i for i in range(k) if v_bits[i] > 0 and u_bits[i] > 0]
        keep.sort(key=lambda i: (-int(v_bits[i]), -int(u_bits[i])))  # stable: σ order within a run
        order = torch.tensor(keep, dtype=torch.long, device=v.codes.device)
        widths = v_bits.to(order.device)[order] + 16 * u_bits.to(order.device)[order]
        widths += 256 * exponent_of(group_sizes)
        scales = uniform.scales_to_bits(torch.cat([v.scales[order], u.scales[order]], 1))
        ranks = torch.cat([widths.to(torch.int16)[:, None], scales], 1)
        runs, _ = layout_of(ranks, v.group_size)
        return cls(
            m=m,
            n=n,
            group_sizes=group_sizes,
            runs=runs,
            v=bitpacking.pack(v.codes[order], [(c, b) for c, b, _ in runs]),
            u=bitpacking.pack(u.codes[order], [(c, b) for c, _, b in runs]),
            ranks=ranks,
            zeros=None
            if v.zeros is None or u.zeros is None
            else bitpacking.pack(
                torch.cat([v.zeros[order], u.zeros[order]], 1),
                [(c, max(b, d)) for c, b, d in runs],
            ),
        )

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

        Args:
            group_size: of V, and of U where the ranks do not say otherwise.
            tensors: `v` and `u` may be meta.

        Raises:
            DeltaMixError: they are not those of such matrices, or hold what no compressor writes.
        """
        layouts, group_sizes = checked_layouts(m, n, group_size, tensors, experts)
        return cls(m, n, group_sizes, layouts[0] if experts is None else [], **tensors)

    @classmethod
    def read(
        cls,
        prefix: str,
        get: Callable[[str], Tensor],
        m: int,
        n: int,
        group_size: int,
        quantizer: Quantizer,
        experts: int | None = None,
    ) -> PackedDelta:
        """Read the tensors stored for `prefix`, which `get` gives by name, as `checked` does.

        Raises:
            DeltaMixError: as `checked`.
        """
        names = part_names(prefix, quantizer, experts is not None)
        tensors = {part: get(name) for part, name in names.items()}
        return cls.checked(m, n, group_size, tensors, experts)

    def names(self, prefix: str) -> dict[str, str]:
        """Name the tensors by part, as they are stored for the module or parameter `prefix`."""
        return part_names(prefix, self.quantizer, self.counts is not None)

    @property
    def quantizer(self) -> Quantizer:
        return quantizer_of(self.zeros)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = parts(self.quantizer, self.counts is not None)
        return {part: getattr(self, part) for part in held}

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The packed tensors and the layout, in the order the ops take them."""
        flat = [number for run in self.runs for number in run]
        layout = flat if self.counts is None else self.counts
        return self.v, self.u, self.ranks, self.zeros, layout, self.m, self.n, [*self.group_sizes]

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
        return bytes_by_kind(sizes, self.rank)

    def _side(self, codes: Tensor, length: int, v_side: bool) -> Tensor:
        runs = [(c, v if v_side else u) for c, v, u in self.runs]
        split, _ = scale_counts(self.m, self.n, self.group_sizes)
        part = slice(None, split) if v_side else slice(split, None)
        group_size = self.group_sizes[0 if v_side else 1]
        plain = bitpacking.unpack(codes, runs, length)
        scales = uniform.scales_from_bits(self.ranks[:, 1:].contiguous())[:, part]
        points = None
        if self.zeros is not None:
            points = zero_points(self.zeros, self.runs, self.ranks.shape[1] - 1)[:, part]
        return self.quantizer.decode(plain, scales, points, row_bits(runs, codes), group_size)

    def right(self) -> Tensor:
        """Decode V̂ of one matrix, float32 [k, n]."""
        return self._side(self.v, self.n, v_side=True)

    def left(self) -> Tensor:
        """Decode Û of one matrix with σ folded in, transposed: float32 [k, m]."""
        return self._side(self.u, self.m, v_side=False)

    def dense(self) -> Tensor:
        """Multiply out the delta of one matrix, float32 [m, n]."""
        return self.left().T @ self.right()

    def split(self) -> list[PackedDelta | None]:
        """Give every expert its own, as views, None for one without a rank; a matrix is itself."""
        if self.counts is None:
            return [self]
        counts = self.counts.tolist()
        layouts = [layout_of(part, self.group_sizes[0])[0] for part in self.ranks.split(counts)]
        rows = {
            "v": [sum(c * v for c, v, _ in runs) for runs in layouts],
            "u": [sum(c * u for c, _, u in runs) for runs in layouts],
            "ranks": counts,
            "zeros": [sum(c * max(v, u) for c, v, u in runs) for runs in layouts],
        }
        pieces = {p: t.split(rows[p]) for p, t in self.tensors.items() if p in rows}
        found: list[PackedDelta | None] = []
        for number, runs in enumerate(layouts):
            own: Any = {part: piece[number] for part, piece in pieces.items()}
            packed = PackedDelta(self.m, self.n, self.group_sizes, runs, **own)
            found.append(packed if runs else None)
        return found

    def chosen(self, experts: Tensor) -> tuple[PackedDelta, Tensor]:
        """Gather all ranks of some experts (int64 [H]), sorted by width like those of one matrix.

        Returns:
            The K ranks, and whose each is: int64 [K] in 0 .. H − 1.
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
