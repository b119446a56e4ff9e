"""The packed tensors of ΔW ≈ Û·V̂: names, dtypes, shapes, bytes, and what may not be in them.

Three or four integer tensors hold a matrix (docs/format.md is normative). With k ranks, Gn and Gm
scale groups on the two sides, and ranks sorted by falling (V width, U width):

    v      uint8 [Σ v_bits, ceil(n/8)]     codes of V̂, one rank after the other
    u      uint8 [Σ u_bits, ceil(m/8)]     codes of Ûᵀ (rank-major too)
    ranks  int16 [k, 1 + Gn + Gm]          v_bits + 16·u_bits + 256·e | V scales | U scales
    zeros  uint8 [Σ max bits, ceil((Gn+Gm)/8)]   zero points, packed like codes; min-max only

Scales are bit patterns of bfloat16 in an integer tensor, so that `.to(dtype)` on a model cannot
round them; σ is folded into U's scales. A value is (code − zero)·scale on the min-max grid, and
level(code)·scale with the Gaussian codebook, which has no zero points. e says how long U's scale
groups are: 2^e elements, or as V's if e is 0.

The experts of a 3-D parameter are packed as any matrix, and the tensors of all of them joined along
their first dimension, so that a parameter takes five tensors at most. One more tells them apart:

    counts int32 [experts]                 ranks of each expert, 0 for one that kept none
"""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import DeltaMixError
from . import bitpacking, uniform
from .quantizer import Quantizer, quantizer_of

PREFIX = "dm_"
PARTS = ("v", "u", "ranks", "zeros")  # of a matrix; experts have "counts" too
GROUP_EXPONENTS = range(4, 16)  # 2^e elements: the kernels want a multiple of 16
# Scales lie in 0 .. 2^32 (ours in 1e-9 .. 20): as bit patterns of bfloat16, negative ones, infinity
# and NaN lie outside too. Then Û·V̂ is finite in float32: 255·2^32 each, over less than 2^40 ranks.
SCALE_LIMIT = 0x4F80
DTYPES = {
    **dict.fromkeys(("v", "u", "zeros"), torch.uint8),
    **{"ranks": torch.int16, "counts": torch.int32},
}

Runs = list[tuple[int, int, int]]  # (count, v_bits, u_bits)
GroupSizes = tuple[int, int]  # elements of V and of U that share a scale; 0: the whole vector


def parts(quantizer: Quantizer, experts: bool = False) -> tuple[str, ...]:
    """List the parts of a matrix, or of the `experts` of a 3-D parameter."""
    matrix = PARTS if quantizer.zero_points else PARTS[:-1]
    return (*matrix, "counts") if experts else matrix


def part_names(prefix: str, quantizer: Quantizer, experts: bool = False) -> dict[str, str]:
    """Name the packed tensors by part: `<module>.dm_v`, or of experts `<parameter>_dm_v`.

    An empty prefix gives the attributes of the module itself.
    """
    joint = "_" if experts else "." if prefix else ""
    return {part: f"{prefix}{joint}{PREFIX}{part}" for part in parts(quantizer, experts)}


def scale_counts(m: int, n: int, group_sizes: GroupSizes) -> tuple[int, int]:
    """Count the scale groups of one rank's V and U, (Gn, Gm)."""
    return uniform.group_count(n, group_sizes[0]), uniform.group_count(m, group_sizes[1])


def packed_runs(runs: Runs) -> dict[str, list[tuple[int, int]]]:
    """Give each bit-packed part its runs (count, bits), as `bitpacking` takes them."""
    return {
        "v": [(count, v) for count, v, _ in runs],
        "u": [(count, u) for count, _, u in runs],
        "zeros": [(count, max(v, u)) for count, v, u in runs],
    }


def part_shapes(
    m: int,
    n: int,
    runs: Runs,
    group_sizes: GroupSizes,
    quantizer: Quantizer,
    experts: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Look up the shapes that `runs` imply for an [m, n] matrix, or for `experts` of them."""
    rows = {part: bitpacking.packed_rows(own) for part, own in packed_runs(runs).items()}
    scale_groups = sum(scale_counts(m, n, group_sizes))
    shapes: dict[str, tuple[int, ...]] = {
        "v": (rows["v"], -(-n // 8)),
        "u": (rows["u"], -(-m // 8)),
        "ranks": (sum(count for count, _, _ in runs), 1 + scale_groups),
        "zeros": (rows["zeros"], -(-scale_groups // 8)),
        "counts": (experts or 0,),
    }
    return {part: shapes[part] for part in parts(quantizer, experts is not None)}


def rank_bytes(
    m: int, n: int, v_bits: int, u_bits: int, group_sizes: GroupSizes, quantizer: Quantizer
) -> int:
    """Count the bytes of one rank; one with an empty side is not stored."""
    runs = [(1, v_bits, u_bits)] if v_bits and u_bits else []
    shapes = part_shapes(m, n, runs, group_sizes, quantizer)
    return sum(DTYPES[part].itemsize * math.prod(shape) for part, shape in shapes.items())


def bytes_by_kind(part_bytes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Sum the bytes of parts by kind; widths of `ranks` and experts' counts are "metadata"."""
    size, widths = Counter(part_bytes), 2 * ranks
    return {
        "payload": size["v"] + size["u"],
        "scales": size["ranks"] - widths + size["zeros"],
        "metadata": widths + size["counts"],
    }


def layout_of(ranks: Tensor, group_size: int) -> tuple[Runs, GroupSizes]:
    """Read column 0 of the int16 `ranks` [k, 1 + groups] of a matrix: its runs and group sizes.

    `group_size` is V's, and U's where the column does not say otherwise. Raises DeltaMixError for a
    width outside 1..8, ranks that are not sorted, or a group size that does not exist.
    """
    if ranks.ndim != 2 or ranks.shape[1] == 0 or ranks.dtype != DTYPES["ranks"]:
        raise DeltaMixError(
            f"the ranks are {ranks.dtype} {list(ranks.shape)}, not int16 [k, 1 + groups]: "
            "the file is damaged"
        )
    words = ranks[:, 0]
    v, u = words % 16, words // 16 % 16
    if bool(((v < 1) | (v > 8) | (u < 1) | (u > 8)).any()):
        raise DeltaMixError("a rank has a bit width outside 1..8: the file is damaged")
    pairs = 16 * v + u
    if bool((pairs[1:] > pairs[:-1]).any()):
        raise DeltaMixError("ranks are not sorted by width: the file is damaged")
    least, most = (words // 256).aminmax() if len(words) else (0, 0)
    exponent = int(least) if int(least) == int(most) else -1
    if exponent not in (0, *GROUP_EXPONENTS):
        raise DeltaMixError(
            f"the scale groups of U are 2^{int(least)} to 2^{int(most)} elements, not one power "
            f"from 2^{GROUP_EXPONENTS[0]} to 2^{GROUP_EXPONENTS[-1]}: the file is damaged"
        )
    widths, counts = pairs.unique_consecutive(return_counts=True)
    runs = [(n, w // 16, w % 16) for n, w in zip(counts.tolist(), widths.tolist(), strict=True)]
    return runs, (group_size, 2**exponent if exponent else group_size)


def exponent_of(group_sizes: GroupSizes) -> int:
    """Encode U's group size as column 0 of `ranks` does: e of 2^e, or 0 if it is V's."""
    return 0 if group_sizes[0] == group_sizes[1] else group_sizes[1].bit_length() - 1


def checked_layout(
    m: int, n: int, group_size: int, tensors: Mapping[str, Tensor], experts: int | None
) -> tuple[Runs, GroupSizes]:
    """Read the runs of a matrix, or of all `experts` in turn, as `PackedDelta.checked` does.

    Of `tensors`, `v` and `u` may be meta. Raises DeltaMixError for what no compressor writes.
    """
    ranks = tensors["ranks"]
    _check_count(m, n, ranks.shape[0] if ranks.ndim else 0, experts)  # before they are looked at
    each = [ranks] if experts is None else _split_ranks(m, n, ranks, tensors["counts"], experts)
    layouts = [layout_of(part, group_size) for part in each]
    sizes = {sizes for runs, sizes in layouts if runs or experts is None}
    if len(sizes) != 1:
        raise DeltaMixError(
            "the experts have no ranks, or scale groups of several sizes: the file is damaged"
        )
    (group_sizes,) = sizes
    runs = [run for own, _ in layouts for run in own]
    check_parts(m, n, runs, group_sizes, tensors, experts)
    _check_values(m, n, runs, group_sizes, ranks, tensors.get("zeros"))
    return runs, group_sizes


def _split_ranks(m: int, n: int, ranks: Tensor, counts: Tensor, experts: int) -> list[Tensor]:
    """The ranks of every expert, int16 [k, 1 + groups]; DeltaMixError if `counts` do not fit."""
    if counts.dtype != DTYPES["counts"] or tuple(counts.shape) != (experts,):
        raise DeltaMixError(
            f"the ranks' counts are {counts.dtype} {list(counts.shape)}, {experts} experts need "
            f"torch.int32 [{experts}]: the delta does not belong to this model, or the file is "
            "damaged"
        )
    numbers = counts.tolist()
    if (
        not numbers
        or min(numbers) < 0
        or max(numbers) > min(m, n)
        or ranks.shape[:1] != (sum(numbers),)
    ):
        raise DeltaMixError(
            f"the experts' counts do not fit {list(ranks.shape)} ranks of [{m}, {n}] matrices: "
            "the file is damaged"
        )
    return list(ranks.split(numbers))


def _check_count(m: int, n: int, ranks: int, experts: int | None) -> None:
    if ranks > (1 if experts is None else experts) * min(m, n):
        raise DeltaMixError(
            f"the delta has {ranks} ranks, an [{m}, {n}] matrix has at most {min(m, n)}: the delta "
            "does not belong to this model, or the file is damaged"
        )


def check_parts(
    m: int,
    n: int,
    runs: Runs,
    group_sizes: GroupSizes,
    tensors: Mapping[str, Tensor],
    experts: int | None = None,
) -> None:
    """Refuse tensors that are not those of an [m, n] matrix, or `experts` of them, by `runs`.

    The DeltaMixError names the first part of another shape or dtype, or says that there are more
    ranks than there can be.
    """
    _check_count(m, n, sum(count for count, _, _ in runs), experts)
    expected = part_shapes(m, n, runs, group_sizes, quantizer_of(tensors.get("zeros")), experts)
    for part, shape in expected.items():
        if tuple(tensors[part].shape) != shape or tensors[part].dtype != DTYPES[part]:
            raise DeltaMixError(
                f"packed tensor {PREFIX}{part} is {tensors[part].dtype} "
                f"{list(tensors[part].shape)}, an [{m}, {n}] matrix with these widths needs "
                f"{DTYPES[part]} {list(shape)}: the delta does not belong to this model "
                "(was it resized?), or the file is damaged"
            )


def scales_fit(ranks: Tensor) -> bool:
    """Tell whether the scales in the int16 `ranks` [k, 1 + groups] are finite, from 0 to 2^32."""
    scales = ranks[:, 1:]
    return not scales.numel() or 0 <= int(scales.min()) <= int(scales.max()) < SCALE_LIMIT


def _check_values(
    m: int, n: int, runs: Runs, group_sizes: GroupSizes, ranks: Tensor, zeros: Tensor | None
) -> None:
    """Refuse scales and zero points that no compressor writes; codes cannot be wrong.

    About 5 ms for all matrices of a 135M model on one AMD EPYC core.
    """
    scales = ranks[:, 1:]
    if not scales_fit(ranks):
        raise DeltaMixError("a scale is negative, NaN, infinite or above 2^32: the file is damaged")
    if zeros is None or all(v == u for _, v, u in runs):
        return  # as wide as the codes: every value is one
    sides = zero_points(zeros, runs, scales.shape[1]).split(scale_counts(m, n, group_sizes), 1)
    for side, points in zip(("v", "u"), sides, strict=True):
        widths = row_bits(packed_runs(runs)[side], ranks)
        if bool((points >= 2 ** widths[:, None]).any()):
            raise DeltaMixError("a zero point is no code of its rank: the file is damaged")


def row_bits(runs: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Expand (count, bits) runs to the width of every rank, int64 [k], on the device of `like`."""
    counts, widths = torch.tensor(runs, dtype=torch.int64, device=like.device).view(-1, 2).T
    return widths.repeat_interleave(counts)


def zero_points(zeros: Tensor, runs: Runs, groups: int) -> Tensor:
    """Unpack the zero points, uint8 [k, groups], of both sides: Gn of V̂, then Gm of Û."""
    return bitpacking.unpack(zeros, packed_runs(runs)["zeros"], groups)
