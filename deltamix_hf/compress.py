"""The pipeline: delta → SVD → widths → V by GPTQ → U re-fitted → U by GPTQ → packing.

The only module that knows the order of the stages. Two methods share it:

- `deltamix` (arXiv 2506.11087): error table of V at every candidate width, a 0/1 program picks one
  width per rank, U is re-fitted to the full ΔW given the rounded V (target correction).
- `delta-come` (arXiv 2406.08903): ranks in bands of 8, 3 and 2 bits, U taken from the SVD.

Every matrix gets the same share of the budget (its bf16 bytes times one common ratio); what one
matrix leaves unspent goes to the next, so the whole stays within one rank of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import allocation
from .config import DeltaMixConfig
from .correction import corrected_left_factor, metric_error, plain_left_factor
from .error_table import error_table, pick
from .errors import DeltaMixError
from .format import GUARD, PREFIX, header_bytes
from .gptq import damp, gptq_columns, gptq_rows
from .packed import DTYPES, PackedFactors, part_shapes, rank_bytes
from .svd import thin_svd


@dataclass(frozen=True)
class Matrix:
    """One matrix to compress: how to get its delta, and what it is measured with.

    `delta()` returns ΔW float32 [m, n]; `gram` is C [n, n], or None for the identity (data-free).
    """

    shape: tuple[int, int]
    delta: Callable[[], Tensor]
    gram: Tensor | None = None


@dataclass(frozen=True)
class Compressed:
    """Result for one matrix: packed factors (None: no rank was affordable) and relative error."""

    packed: PackedFactors | None
    error: float


@dataclass(frozen=True)
class Budget:
    """Bytes for packed ranks in total, after headers, guards and overlay are paid."""

    total: int
    fixed: int
    reference: int

    @property
    def ranks(self) -> int:
        return self.total - self.fixed


def plan_budget(
    shapes: Mapping[str, tuple[int, int]],
    overlay: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    guards: list[str],
    config: DeltaMixConfig,
) -> Budget:
    """Split the promised bytes into what is fixed and what is left for ranks.

    Args:
        shapes: module name -> [m, n] of each matrix to pack.
        overlay: tensor name -> (dtype, shape) of everything stored whole.
        guards: names of the guard tensors.

    Raises:
        DeltaMixError: the overlay and headers alone exceed the budget, or no matrix could keep
            even one rank; names the smallest budget that works.
    """
    numel = {name: torch.Size(shape).numel() for name, (_, shape) in overlay.items()}
    reference = 2 * (sum(m * n for m, n in shapes.values()) + sum(numel.values()))
    total = config.budget(reference)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict(overlay)
    entries |= dict.fromkeys(guards, GUARD)
    for name, (m, n) in shapes.items():
        worst = part_shapes(m, n, [(min(m, n), 8, 8)], config.group_size)
        entries |= {f"{name}.{PREFIX}{part}": (DTYPES[part], s) for part, s in worst.items()}
    whole = sum(numel[name] * dtype.itemsize for name, (dtype, _) in overlay.items())
    whole += len(guards)  # a byte each
    least = min(b for b in config.bits if b > 0)
    one_rank = sum(rank_bytes(m, n, least, least, config.group_size) for m, n in shapes.values())
    fixed = whole + header_bytes(entries, total)
    if total < fixed + one_rank:
        needed = fixed + one_rank
        while needed < (more := whole + header_bytes(entries, needed) + one_rank):
            needed = more  # more bytes are longer offsets
        ratio = math.ceil((needed + 1) / reference * 1e6) / 1e6
        advice = f"ratio >= {ratio:.6f} or " if ratio <= 1 else ""
        raise DeltaMixError(
            f"the budget of {total:,} bytes ({total / reference:.4g} of the {reference:,} bf16 "
            f"bytes that differ) is too small: headers and the overlay take {fixed:,}, one "
            f"{least}-bit rank per matrix {one_rank:,}. Give {advice}budget_bytes >= {needed}"
        )
    return Budget(total=total, fixed=fixed, reference=reference)


def compress_all(
    matrices: Mapping[str, Matrix],
    budget: Budget,
    config: DeltaMixConfig,
) -> Iterator[tuple[str, Compressed]]:
    """Yield (name, Compressed) for every matrix, largest ranks first so that slack fills up."""
    sizes = {name: matrix.shape[0] * matrix.shape[1] for name, matrix in matrices.items()}
    left, weight = budget.ranks, sum(sizes.values())
    order = sorted(matrices, key=lambda name: -sum(matrices[name].shape))
    for name in order:
        share = left * sizes[name] // weight
        try:
            result = compress_matrix(matrices[name], share, config)
        except ValueError as error:  # NaN weights, a Hessian that cannot be factorised
            raise DeltaMixError(f"{name}: {error}") from error
        if result.packed is not None:
            left -= sum(result.packed.nbytes.values())
        weight -= sizes[name]
        yield name, result


def compress_matrix(matrix: Matrix, budget: int, config: DeltaMixConfig) -> Compressed:
    """Compress one matrix into at most `budget` bytes of codes, scales, zero points and widths.

    Raises:
        ValueError: the delta holds NaN or infinity, or the Gram cannot be factorised.
    """
    m, n = matrix.shape
    delta, group_size = matrix.delta(), config.group_size
    cost = {b: rank_bytes(m, n, b, b, group_size) for b in range(9)}
    least = min(b for b in config.bits if b > 0) if config.method == "deltamix" else 2
    left, sigma, right = thin_svd(delta, rank=max(budget // cost[least], 0))
    if not len(sigma):
        return Compressed(None, metric_error(delta, torch.zeros_like(delta), matrix.gram))

    if config.method == "deltamix":
        table, candidates = error_table(right, sigma, matrix.gram, config.bits, group_size)
        bits = allocation.solve(
            table, [cost[b] for b in config.bits], config.bits, budget, f_max=config.f_max
        ).bits
        v = pick(candidates, bits)
    else:
        bits = allocation.bands(len(sigma), cost, budget)
        hessian = None if matrix.gram is None else damp(matrix.gram)
        v = gptq_rows(right, hessian, bits, group_size)

    kept = bits > 0
    right_hat = v.dequantize()[kept]
    if config.method == "deltamix":
        target, inner = corrected_left_factor(delta, matrix.gram, right_hat, sigma[kept])
    else:
        target, inner = plain_left_factor(left[:, kept], matrix.gram, right_hat, sigma[kept])
    u = gptq_columns(target, inner, bits[kept], group_size)
    v_kept = type(v)(v.codes[kept], v.scales[kept], v.zeros[kept], group_size)
    error = metric_error(delta, u.dequantize().T @ right_hat, matrix.gram)
    packed = PackedFactors.pack(v_kept, u, bits[kept], bits[kept], group_size)
    return Compressed(packed if packed.rank else None, error)
