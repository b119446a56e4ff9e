"""How far a fine-tune is from its base, and what its delta would lose at each budget.

Both are read tensor by tensor from their files; no model is run. The spectrum of every ΔW goes
through the allocation that compression uses, in the plain metric, so what comes out is the share of
ΔW's energy |ΔW|² that is lost. Compression weighs errors by what the layers see and keeps more of
what matters; the use of these shares is to compare budgets, and one fine-tune with another.
docs/budget.md has them beside the measured KL of real pairs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..allocation.whole_model import DEFAULT_GAP, solve_global
from ..checkpoint.base import BaseCheckpoint, guard_names, same, untied_state
from ..checkpoint.tensor_diff import Difference, differences
from ..compression.budget import plan_budget, rank_options
from ..config import DeltaMixConfig, overlay_dtype
from ..errors import DeltaMixError
from ..linalg.svd import singular_values
from ..method import DEFAULT_METHOD, METHODS
from ..nn.experts import fused_name, fused_sizes, slice_shape
from ..nn.layers import shape_of
from ..storage.sizes import reference_bytes

RATIOS = (1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)

# Share of |ΔW|² that may be lost. The gain kept on three real pairs (docs/results/quality.md) at
# all ratios with a loss up to 3.5 % was at least 99.87 %, up to 7.4 % 99.50 %, up to 15 % 97.84 %.
SAFE_LOSS = 0.075


@dataclass(frozen=True)
class MatrixDistance:
    """One matrix: [m, n], |ΔW|² and |W_base|², and the energy σ² of each rank of ΔW, descending."""

    shape: tuple[int, int]
    delta: float
    base: float
    energies: Tensor
    embedding: bool

    @property
    def ranks_for_90(self) -> int:
        """How many ranks hold 90 % of the energy."""
        held = self.energies.cumsum(0)
        return int((held < 0.9 * held[-1]).sum()) + 1 if len(held) else 0


@dataclass(frozen=True)
class BudgetLoss:
    """A budget as ratio and bytes, and the share of ΔW's energy that is lost under it.

    `lost` is None where headers and overlay alone take more.
    """

    ratio: float
    bytes: int
    lost: float | None


@dataclass(frozen=True)
class Distance:
    """A fine-tune against its base.

    Attributes:
        matrices: what would be packed, by module name.
        overlay: what would be stored whole, by tensor name: its dtype and shape.
        same: how many tensors are identical.
        reference: bf16 bytes of all that differs.
        budgets: the loss at each ratio, in the order asked for; none if nothing differs.
    """

    matrices: dict[str, MatrixDistance]
    overlay: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    same: int
    reference: int
    budgets: list[BudgetLoss]

    @property
    def relative(self) -> float:
        """|ΔW| / |W_base| over all matrices that differ."""
        return relative(list(self.matrices.values()))

    @property
    def suggested(self) -> BudgetLoss | None:
        """The smallest of the budgets that is safe; None if none is."""
        safe = [b for b in self.budgets if b.lost is not None and b.lost <= SAFE_LOSS]
        return min(safe, key=lambda b: b.bytes, default=None)

    def by_type(self) -> dict[str, list[MatrixDistance]]:
        """Group the matrices by name without the numbers of layers."""
        groups: dict[str, list[MatrixDistance]] = {}
        for name, matrix in self.matrices.items():
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", fused_name(name) or name)
            groups.setdefault(kind, []).append(matrix)
        return groups


def relative(matrices: Sequence[MatrixDistance]) -> float:
    """Divide |ΔW| by |W_base| of some matrices together; infinite over a base of zeros."""
    delta, base = (sum(getattr(m, part) for m in matrices) for part in ("delta", "base"))
    return (delta / base) ** 0.5 if base else (float("inf") if delta else 0.0)


def measure(
    model: PreTrainedModel,
    tuned_files: list[str],
    base_files: list[str],
    config: DeltaMixConfig,
    ratios: Sequence[float] = RATIOS,
) -> Distance:
    """Measure the distance of two checkpoints of the architecture of `model`, which may be meta.

    Raises:
        DeltaMixError: they have no tensor in common or other shapes, or the fine-tune holds NaN.
    """
    tuned, base = (
        BaseCheckpoint(tuned_files, model),
        BaseCheckpoint(base_files, model, of_base=True),
    )
    names = [name for name in untied_state(model) if name in tuned]
    if not any(name in base for name in names):
        raise DeltaMixError("base and fine-tune have no tensor in common: they are not of a family")
    matrices: dict[str, MatrixDistance] = {}
    overlay: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    identical = 0
    bar = logging.tqdm(names, desc="Measuring ΔW", unit="tensor")
    for found in differences(model, base, ((name, tuned.read(name)) for name in bar)):
        if found.kind == "same":
            identical += 1
        elif found.kind in ("matrix", "experts"):
            matrices |= _distances(model, found)
        else:
            overlay[found.name] = overlay_dtype(found.ours.dtype, config), tuple(found.ours.shape)
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    reference = reference_bytes(shapes, {name: shape for name, (_, shape) in overlay.items()})
    distance = Distance(matrices, overlay, identical, reference, [])
    guards, experts = guard_names(model, base, overlay), fused_sizes(model, matrices)
    gap = config.allocation_gap or DEFAULT_GAP
    for ratio in ratios if matrices or overlay else ():
        distance.budgets.append(_loss(distance, ratio, guards, experts, gap))
    return distance


def _distances(model: PreTrainedModel, found: Difference) -> dict[str, MatrixDistance]:
    """Measure the matrix, or those of the experts that differ, by name."""
    assert found.base is not None
    owner, _, leaf = found.name.rpartition(".")
    module = model.get_submodule(owner)
    if found.kind == "matrix":
        shape, pairs = shape_of(module), {owner: (found.ours, found.base)}
    else:
        shape, each = slice_shape(module, leaf), zip(found.ours, found.base, strict=True)
        pairs = {f"{found.name}.{i}": pair for i, pair in enumerate(each) if not same(*pair)}
    measured = {}
    for name, (ours, base) in pairs.items():
        delta = ours.float() - base.float()
        moved, size = (float(t.double().square().sum()) for t in (delta, base))
        energies, embedding = singular_values(delta).square(), isinstance(module, nn.Embedding)
        measured[name] = MatrixDistance(shape, moved, size, energies, embedding)
    return measured


def _loss(
    found: Distance, ratio: float, guards: list[str], experts: dict[str, int], gap: float
) -> BudgetLoss:
    config = DeltaMixConfig(ratio=ratio, method=replace(METHODS[DEFAULT_METHOD], drop_penalty=1.0))
    shapes = {name: matrix.shape for name, matrix in found.matrices.items()}
    embeddings = {name for name, matrix in found.matrices.items() if matrix.embedding}
    try:
        promised, budget = plan_budget(shapes, found.overlay, guards, config, embeddings, experts)
    except DeltaMixError:  # too small
        return BudgetLoss(ratio, config.budget(found.reference), None)
    energies = [matrix.energies for matrix in found.matrices.values()]
    options = [
        rank_options(matrix.shape, config.method.group_sizes(matrix.embedding), config)[0]
        for matrix in found.matrices.values()
    ]
    error = solve_global(energies, options, budget, gap).error
    whole = sum(float(e.sum()) for e in energies)
    return BudgetLoss(ratio, promised, error / whole if whole else 0.0)
