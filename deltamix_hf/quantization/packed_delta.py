"""The packed form of one matrix: ΔW ≈ Û·V̂ as integer codes, scales and per-rank widths.

Three or four integer tensors hold everything (docs/format.md is normative). With k ranks,
Gn and Gm scale groups on the two sides, and ranks sorted by falling (V width, U width):

    v      uint8 [Σ v_bits, ceil(n/8)]     codes of V̂, one rank after the other
    u      uint8 [Σ u_bits, ceil(m/8)]     codes of Ûᵀ (rank-major too)
    ranks  int16 [k, 1 + Gn + Gm]          v_bits + 16·u_bits + 256·e | V scales | U scales
    zeros  uint8 [Σ max bits, ceil((Gn+Gm)/8)]   zero points, packed like codes; min-max only

Scales are bit patterns of bfloat16 in an integer tensor, so that `.to(dtype)` on a model cannot
round them; σ is folded into U's scales. A value is (code − zero)·scale on the min-max grid, and
level(code)·scale with the Gaussian codebook, which has no zero points. e says how long U's scale
groups are: 2^e elements, or as V's if e is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaMixError
from . import bitpacking, uniform
from . import gaussian as codebook
from .gptq import Rounded

PARTS = ("v", "u", "ranks", "zeros")
GROUP_EXPONENTS = range(4, 16)  # 2^e elements: the kernels want a multiple of 16
# Scales lie in 0 .. 2^32 (ours in 1e-9 .. 20): as bit patterns of bfloat16, negative ones, infinity
# and NaN lie outside too. Then Û·V̂ is finite in float32: 255·2^32 each, over less than 2^40 ranks.
SCALE_LIMIT = 0x4F80
DTYPES = {"v": torch.uint8, "u": torch.uint8, "ranks": torch.int16, "zeros": torch.uint8}

Runs = list[tuple[int, int, int]]  # (count, v_bits, u_bits)
GroupSizes = tuple[int, int]  # elements of V and of U that share a scale; 0: the whole vector


def parts(gaussian: bool) -> tuple[str, ...]:
    """Names of the tensors of one matrix."""
    return PARTS[:-1] if gaussian else PARTS


def scale_counts(m: int, n: int, group_sizes: GroupSizes) -> tuple[int, int]:
    """Scale groups of one rank's V and U, (Gn, Gm)."""
    return uniform.group_count(n, group_sizes[0]), uniform.group_count(m, group_sizes[1])


def rank_bytes(
    m: int, n: int, v_bits: int, u_bits: int, group_sizes: GroupSizes, gaussian: bool = False
) -> int:
    """True bytes of one rank: codes of both vectors, scales, zero points and widths."""
    if v_bits == 0 or u_bits == 0:
        return 0  # a rank with an empty side contributes nothing and is not stored
    scale_groups = sum(scale_counts(m, n, group_sizes))
    codes = v_bits * -(-n // 8) + u_bits * -(-m // 8)
    zeros = 0 if gaussian else max(v_bits, u_bits) * -(-scale_groups // 8)
    return codes + 2 * (1 + scale_groups) + zeros


def part_shapes(
    m: int, n: int, runs: Runs, group_sizes: GroupSizes, gaussian: bool = False
) -> dict[str, tuple[int, int]]:
    """Shapes of the tensors that `runs` imply for an [m, n] matrix."""
    scale_groups = sum(scale_counts(m, n, group_sizes))
    shapes = {
        "v": (sum(c * v for c, v, _ in runs), -(-n // 8)),
        "u": (sum(c * u for c, _, u in runs), -(-m // 8)),
        "ranks": (sum(c for c, _, _ in runs), 1 + scale_groups),
        "zeros": (sum(c * max(v, u) for c, v, u in runs), -(-scale_groups // 8)),
    }
    return {part: shapes[part] for part in parts(gaussian)}


def check_parts(
    m: int,
    n: int,
    runs: Runs,
    group_sizes: GroupSizes,
    tensors: Mapping[str, Tensor],
    matrices: int = 1,
) -> None:
    """Refuse tensors that are not those of an [m, n] matrix, or several, with these widths.

    Raises:
        DeltaMixError: names the first part of another shape or dtype, or more ranks than there can
            be.
    """
    if (rank := sum(count for count, _, _ in runs)) > matrices * min(m, n):
        raise DeltaMixError(
            f"the delta has {rank} ranks, an [{m}, {n}] matrix has at most {min(m, n)}: the delta "
            "does not belong to this model, or the file is damaged"
        )
    expected = part_shapes(m, n, runs, group_sizes, gaussian="zeros" not in tensors)
    for part, shape in expected.items():
        if tuple(tensors[part].shape) != shape or tensors[part].dtype != DTYPES[part]:
            raise DeltaMixError(
                f"packed tensor dm_{part} is {tensors[part].dtype} {list(tensors[part].shape)}, an "
                f"[{m}, {n}] matrix with these widths needs {DTYPES[part]} {list(shape)}: the "
                "delta does not belong to this model, or the file is damaged"
            )


def check_values(
    m: int, n: int, runs: Runs, group_sizes: GroupSizes, ranks: Tensor, zeros: Tensor | None
) -> None:
    """Refuse scales and zero points that no compressor writes; codes cannot be wrong.

    About 5 ms for all matrices of a 135M model on one AMD EPYC core.

    Raises:
        DeltaMixError: a scale is negative, NaN, infinite or absurdly large, or a zero point is no
            code of its rank.
    """
    scales = ranks[:, 1:]
    if scales.numel() and not 0 <= int(scales.min()) <= int(scales.max()) < SCALE_LIMIT:
        raise DeltaMixError("a scale is negative, NaN, infinite or above 2^32: the file is damaged")
    if zeros is None or all(v == u for _, v, u in runs):
        return  # as wide as the codes: every value is one
    points = zero_points(zeros, runs, scales.shape[1])
    split, _ = scale_counts(m, n, group_sizes)
    for side, index in ((points[:, :split], 0), (points[:, split:], 1)):
        widths = row_bits([(count, bits[index]) for count, *bits in runs], ranks)
        if bool((side >= 2 ** widths[:, None]).any()):
            raise DeltaMixError("a zero point is no code of its rank: the file is damaged")


def layout_of(ranks: Tensor, group_size: int) -> tuple[Runs, GroupSizes]:
    """Read column 0 of `ranks` [k, 1+G]: runs of equal (v_bits, u_bits), and the group sizes.

    Args:
        group_size: of V, and of U where the column does not say otherwise.

    Raises:
        DeltaMixError: a width outside 1..8, ranks that are not sorted, or a group size that does
            not exist.
    """
    if ranks.ndim != 2 or ranks.shape[1] == 0 or ranks.dtype != DTYPES["ranks"]:
        raise DeltaMixError(
            f"the ranks are {ranks.dtype} {list(ranks.shape)}, not int16 [k, 1 + groups]: "
            "the file is damaged"
        )
    words = ranks[:, 0].tolist()
    pairs = [(w % 16, w // 16 % 16) for w in words]
    if any(not (1 <= v <= 8 and 1 <= u <= 8) for v, u in pairs):
        raise DeltaMixError("a rank has a bit width outside 1..8: the file is damaged")
    if pairs != sorted(pairs, reverse=True):
        raise DeltaMixError("ranks are not sorted by width: the file is damaged")
    exponents = {w // 256 for w in words} or {0}
    (exponent,) = exponents if len(exponents) == 1 else (-1,)
    if exponent not in (0, *GROUP_EXPONENTS):
        raise DeltaMixError(
            f"the scale groups of U are 2^{sorted(exponents)} elements, not one power from "
            f"2^{GROUP_EXPONENTS[0]} to 2^{GROUP_EXPONENTS[-1]}: the file is damaged"
        )
    runs = [(len(list(same)), v, u) for (v, u), same in groupby(pairs)]
    return runs, (group_size, 2**exponent if exponent else group_size)


def exponent_of(group_sizes: GroupSizes) -> int:
    """What column 0 of `ranks` holds of U's group size: e of 2^e, or 0 if it is V's."""
    return 0 if group_sizes[0] == group_sizes[1] else group_sizes[1].bit_length() - 1


@dataclass
class PackedFactors:
    """Packed ΔW ≈ Û·V̂ of an [m, n] matrix."""

    m: int
    n: int
    group_sizes: GroupSizes
    runs: Runs
    v: Tensor
    u: Tensor
    ranks: Tensor
    zeros: Tensor | None = None  # None: Gaussian codebook

    @classmethod
    def pack(cls, v: Rounded, u: Rounded) -> PackedFactors:
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
    def checked(
        cls, m: int, n: int, group_size: int, tensors: Mapping[str, Tensor]
    ) -> PackedFactors:
        """The factors of an [m, n] matrix from stored tensors.

        Args:
            group_size: of V, and of U where the ranks do not say otherwise.

        Raises:
            DeltaMixError: they are not those of such a matrix, or hold what none does.
        """
        runs, group_sizes = layout_of(tensors["ranks"], group_size)
        check_parts(m, n, runs, group_sizes, tensors)
        zeros = tensors.get("zeros")
        check_values(m, n, runs, group_sizes, tensors["ranks"], zeros)
        return cls(m, n, group_sizes, runs, tensors["v"], tensors["u"], tensors["ranks"], zeros)

    @property
    def gaussian(self) -> bool:
        return self.zeros is None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in parts(self.gaussian)}

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The packed tensors and the layout, in the order the ops take them."""
        flat = [number for run in self.runs for number in run]
        layout = flat, self.m, self.n, list(self.group_sizes)
        return self.v, self.u, self.ranks, self.zeros, *layout

    def to(self, device: torch.device) -> PackedFactors:
        """On `device`; from pinned memory to a GPU without waiting for the copy."""
        later = device.type == "cuda"
        return self._changed(lambda tensor: tensor.to(device, non_blocking=later))

    def move(self, device: torch.device) -> None:
        """`to`, in place."""
        vars(self).update(self.to(device).tensors)

    def pinned(self) -> PackedFactors:
        """In page-locked host memory; needs a GPU."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PackedFactors:
        changed: Any = {part: change(tensor) for part, tensor in self.tensors.items()}
        return replace(self, **changed)

    @property
    def rank(self) -> int:
        return self.ranks.shape[0]

    @property
    def nbytes(self) -> dict[str, int]:
        """True bytes: codes ("payload"), scales and zero points ("scales"), widths ("metadata")."""
        widths = 2 * self.rank
        return {
            "payload": self.v.numel() + self.u.numel(),
            "scales": 2 * self.ranks.numel()
            - widths
            + (0 if self.zeros is None else self.zeros.numel()),
            "metadata": widths,
        }

    def _side(self, codes: Tensor, length: int, v_side: bool) -> Tensor:
        runs = [(c, v if v_side else u) for c, v, u in self.runs]
        split, _ = scale_counts(self.m, self.n, self.group_sizes)
        part = slice(None, split) if v_side else slice(split, None)
        group_size = self.group_sizes[0 if v_side else 1]
        plain = bitpacking.unpack(codes, runs, length)
        scales = uniform.scales_from_bits(self.ranks[:, 1:].contiguous())[:, part]
        if self.zeros is None:
            return codebook.dequantize(plain, scales, row_bits(runs, codes), group_size)
        points = zero_points(self.zeros, self.runs, self.ranks.shape[1] - 1)[:, part]
        return uniform.dequantize(plain, scales, points, group_size)

    def right(self) -> Tensor:
        """V̂, float32 [k, n]."""
        return self._side(self.v, self.n, v_side=True)

    def left(self) -> Tensor:
        """Û with σ folded in, transposed: float32 [k, m]."""
        return self._side(self.u, self.m, v_side=False)

    def dense(self) -> Tensor:
        """The delta it stands for, float32 [m, n]."""
        return self.left().T @ self.right()


def row_bits(runs: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Width of every rank, int64 [k], on the device of `like`, from (count, bits) runs."""
    counts = torch.tensor([c for c, _ in runs], dtype=torch.int64, device=like.device)
    widths = torch.tensor([b for _, b in runs], dtype=torch.int64, device=like.device)
    return widths.repeat_interleave(counts)


def zero_points(zeros: Tensor, runs: Runs, groups: int) -> Tensor:
    """Zero points uint8 [k, groups] of both sides, Gn of V̂ then Gm of Û."""
    return bitpacking.unpack(zeros, [(c, max(v, u)) for c, v, u in runs], groups)
