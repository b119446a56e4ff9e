"""The packed form of a mixture's experts: the matrices of one 3-D parameter, one behind the other.

Every expert's [m, n] matrix is packed as any other (`packed.py`), and the tensors of all of them
are joined along their first dimension, in the order of the experts, so that a parameter takes five
tensors at most, not four for each of 128 experts. One more tensor tells them apart:

    counts  int32 [experts]     ranks of each expert, 0 for one that kept none

What belongs to one expert is a slice, so nothing is copied to read it. What belongs to some of them
is gathered with a few operations, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaMixError
from .packed_delta import (
    DTYPES,
    PARTS,
    GroupSizes,
    PackedFactors,
    Runs,
    check_parts,
    check_values,
    layout_of,
    part_shapes,
)

EXPERT_PARTS = (*PARTS, "counts")
COUNT_BYTES = 4  # of one expert


def expert_parts(gaussian: bool) -> tuple[str, ...]:
    """Names of the tensors of one 3-D parameter."""
    return tuple(part for part in EXPERT_PARTS if not (gaussian and part == "zeros"))


def largest_parts(
    experts: int, m: int, n: int, group_sizes: GroupSizes, gaussian: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors if every expert kept all ranks at 8 bits."""
    runs = [(experts * min(m, n), 8, 8)]
    shapes = part_shapes(m, n, runs, group_sizes, gaussian)
    found = {part: (DTYPES[part], (*shape,)) for part, shape in shapes.items()}
    return {**found, "counts": (torch.int32, (experts,))}


def expert_layouts(
    experts: int, m: int, n: int, group_size: int, tensors: Mapping[str, Tensor]
) -> tuple[list[Runs], GroupSizes]:
    """Runs of every expert, and the group sizes they share; refuses what cannot be.

    Args:
        tensors: by part; only `ranks`, `counts` and `zeros` are read, the others may be meta.

    Raises:
        DeltaMixError: not the tensors of this many [m, n] matrices, or values no compressor writes.
    """
    ranks, counts, zeros = tensors["ranks"], tensors["counts"], tensors.get("zeros")
    if counts.dtype != torch.int32 or tuple(counts.shape) != (experts,):
        raise DeltaMixError(
            f"the ranks' counts are {counts.dtype} {list(counts.shape)}, {experts} experts need "
            f"torch.int32 [{experts}]: the delta does not belong to this model, or the file is "
            "damaged"
        )
    numbers = counts.tolist()
    if min(numbers) < 0 or max(numbers) > min(m, n) or ranks.shape[:1] != (sum(numbers),):
        raise DeltaMixError(
            f"the experts' counts do not fit {list(ranks.shape)} ranks of [{m}, {n}] matrices: "
            "the file is damaged"
        )
    layouts = [layout_of(part, group_size) for part in ranks.split(numbers)]
    runs = [run for expert, _ in layouts for run in expert]
    sizes = {sizes for (_, sizes), count in zip(layouts, numbers, strict=True) if count}
    if len(sizes) != 1:
        raise DeltaMixError(
            "the experts have no ranks, or scale groups of several sizes: the file is damaged"
        )
    (group_sizes,) = sizes
    check_parts(m, n, runs, group_sizes, tensors, matrices=experts)
    rows = [sum(c * max(v, u) for c, v, u in expert) for expert, _ in layouts]
    points = [None] * experts if zeros is None else zeros.split(rows)
    for (expert, _), part, point in zip(layouts, ranks.split(numbers), points, strict=True):
        check_values(m, n, expert, group_sizes, part, point)
    return [expert for expert, _ in layouts], group_sizes


@dataclass
class PackedExperts:
    """Packed deltas of the experts of one 3-D parameter, each an [m, n] matrix."""

    m: int
    n: int
    group_sizes: GroupSizes
    v: Tensor
    u: Tensor
    ranks: Tensor
    counts: Tensor
    zeros: Tensor | None = None

    @classmethod
    def join(cls, factors: Sequence[PackedFactors | None]) -> PackedExperts:
        """Of every expert's factors, None for one without a rank; one at least has some."""
        kept = [packed for packed in factors if packed is not None]
        counts = [0 if packed is None else packed.rank for packed in factors]
        joined: dict[str, Any] = {
            part: torch.cat([packed.tensors[part] for packed in kept]) for part in kept[0].tensors
        }
        joined["counts"] = torch.tensor(counts, dtype=torch.int32, device=kept[0].v.device)
        return cls(kept[0].m, kept[0].n, kept[0].group_sizes, **joined)

    @classmethod
    def checked(
        cls, experts: int, m: int, n: int, group_size: int, tensors: Mapping[str, Tensor]
    ) -> PackedExperts:
        """The deltas of `experts` [m, n] matrices from stored tensors.

        Raises:
            DeltaMixError: they are not those of such matrices, or hold what none does.
        """
        _, group_sizes = expert_layouts(experts, m, n, group_size, tensors)
        return cls(m, n, group_sizes, **tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in expert_parts(self.zeros is None)}

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The packed tensors and the layout, in the order the op takes them."""
        layout = self.m, self.n, list(self.group_sizes)
        return self.v, self.u, self.ranks, self.counts, self.zeros, *layout

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device) -> PackedExperts:
        """On `device`; from pinned memory to a GPU without waiting for the copy."""
        later = device.type == "cuda"
        return self._changed(lambda tensor: tensor.to(device, non_blocking=later))

    def move(self, device: torch.device) -> None:
        """`to`, in place."""
        vars(self).update(self.to(device).tensors)

    def pinned(self) -> PackedExperts:
        """In page-locked host memory; needs a GPU."""
        return self._changed(Tensor.pin_memory)

    def untied(self) -> PackedExperts:
        """The same memory in other tensors: views of theirs do not keep ours alive."""
        return self._changed(lambda tensor: tensor.data)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PackedExperts:
        changed: Any = {part: change(tensor) for part, tensor in self.tensors.items()}
        return replace(self, **changed)

    def split(self) -> list[PackedFactors | None]:
        """Every expert's own factors, as views; None for one without a rank."""
        counts = self.counts.tolist()
        layouts = [layout_of(part, self.group_sizes[0])[0] for part in self.ranks.split(counts)]
        rows = {
            "v": [sum(c * v for c, v, _ in runs) for runs in layouts],
            "u": [sum(c * u for c, _, u in runs) for runs in layouts],
            "ranks": counts,
            "zeros": [sum(c * max(v, u) for c, v, u in runs) for runs in layouts],
        }
        pieces = {p: t.split(rows[p]) for p, t in self.tensors.items() if p in rows}
        found: list[PackedFactors | None] = []
        for number, runs in enumerate(layouts):
            own: Any = {part: piece[number] for part, piece in pieces.items()}
            packed = PackedFactors(self.m, self.n, self.group_sizes, runs, **own)
            found.append(packed if runs else None)
        return found

    def chosen(self, experts: Tensor) -> tuple[PackedFactors, Tensor]:
        """All ranks of some experts (int64 [H]), sorted by width like those of one matrix.

        Returns:
            The K ranks, and whose each is: int64 [K] in 0 .. H − 1.
        """
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
        factors = PackedFactors(self.m, self.n, self.group_sizes, triples, **own)
        return factors, owner[order]


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ... of every range, one range after the other; int64."""
    ends = sizes.cumsum(0)
    steps = torch.arange(int(ends[-1]) if len(ends) else 0, device=starts.device)
    return steps + (starts - ends + sizes).repeat_interleave(sizes)
