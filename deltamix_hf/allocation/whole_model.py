"""One byte budget for all ranks of all matrices of a model.

Rank i has an energy h_i, and its matrix a table of choices shared by all ranks of that matrix:

    min  sum_i h_i relative_b(i)   s.t.  sum_i cost_b(i) <= budget,   one choice b(i) for each rank

A 7B model has 917 504 ranks, so 5 to 16 million 0/1 variables; its linear relaxation alone takes
HiGHS 8-18 s and 2.7-3.3 GB. Four steps leave HiGHS the 0/1 program of a few dozen ranks:

1. The linear relaxation in closed form, as in `knapsack`. Errors factorise, so the hull of the
   choices is the same for all ranks of a matrix, up to the factor h_i.
2. The Lagrangian  sum_i min_b (h_i relative_b + L cost_b) - L budget  is a lower bound for any
   L >= 0. The margin of rank i is what the bound gains if i makes any choice but the one bought.
3. A window: the ranks of least margin are open, all others keep the choice bought, and `knapsack`
   solves the 0/1 program over the window by HiGHS.
4. A solution either changes nothing outside the window, then HiGHS bounds it, or has at least the
   Lagrangian plus the least margin outside. The smaller of the two bounds the whole model. Windows
   grow until error and bound are within 1e-6.

Up to a thousand ranks that is nearly always the proven optimum; above, where the node limit ends
the search, gaps of 5e-5 were met. Two busy cores, four 7B models each
(`examples/bench_quality/allocation_7b.py`): 6 choices 1.5-2.6 s, 0.7 GB, a gap of at most 1.3e-7;
17 choices 2.2-2.7 s, 0.8 GB, 5.6e-8; 50 choices 6-9 s, 1.2 GB, 2.8e-7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .knapsack import Allocation, buy, hull, improve, relax

# Ranks left open. 16 of a 7B model spend the budget to its last 100 bytes and leave a gap of about
# 1e-7 within 1 s (50 choices: 6 s); 32 take up to 15 s for 1e-9, and 4096 took 253 s. Wider windows
# are for models of fewer ranks: fewer of their choices lie within the gap, so HiGHS proves more.
_WINDOWS = (16, 32, 128, 1024)
DEFAULT_GAP = 1e-6
# Of HiGHS's search in a window. 24 models of 300 to 900 ranks and 37 choices took at most 2.4 s and
# had the errors of 20000 nodes (15.9 s); 500 nodes took 1.2 s and lost 6e-5 of one.
_NODES = 2000

# The price of a choice that a shorter table lacks.
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Choices:
    """What each rank of one matrix can be stored as. Choice 0 drops the rank and costs nothing.

    `relative` float `[B]` >= 0: error left, in units of the rank's energy (above 1 for a choice
    that does more harm than the rank is worth). `cost` int64 `[B]` >= 0: bytes of one rank.
    """

    relative: Tensor
    cost: Tensor


def solve_global(
    energies: Sequence[Tensor],
    choices: Sequence[Choices],
    budget: int,
    gap: float = DEFAULT_GAP,
) -> Allocation:
    """Choices of least total error within `budget` bytes; deterministic.

    `energies`, float `[k]` >= 0 per matrix, are the errors (in nats, say) if a rank is lost, in any
    order; `choices` is one table per matrix. Windows grow until the relative gap between error and
    bound is at most `gap`. Raises ValueError for a negative budget, or shapes or values out of
    range.
    """
    sizes, energy, relative, cost = _checked(energies, choices, budget)
    matrix = np.repeat(np.arange(len(sizes)), sizes)
    scale = float(energy.max(initial=0.0)) or 1.0
    energy = energy / scale
    # The remainder can never be spent, and would loosen the bound.
    usable = budget - budget % (int(np.gcd.reduce(cost[cost < _NEVER])) or 1)

    choice, multiplier = buy(hull(relative, cost), energy, matrix, usable)
    priced = energy[:, None] * relative[matrix] + (multiplier * cost)[matrix]
    least = priced.min(axis=1)
    lagrangian = math.fsum(least) - multiplier * usable
    priced[np.arange(len(energy)), choice] = np.inf
    margin = priced.min(axis=1) - least
    del priced  # 125 MB for 7B and 17 choices

    bought, error, bound = choice.copy(), math.inf, lagrangian
    order = np.argsort(margin, kind="stable")
    for size in _WINDOWS:
        window, outside = order[:size], order[size:]
        held = matrix[outside], bought[outside]
        # Row 0 is all that stays as it is; its other choices are no better, and never affordable.
        errors = np.empty((len(window) + 1, relative.shape[1]))
        prices = np.full(errors.shape, _NEVER)
        errors[0], prices[0, 0] = math.fsum(energy[outside] * relative[held]), cost[held].sum()
        errors[1:] = energy[window, None] * relative[matrix[window]]
        prices[1:] = cost[matrix[window]]
        relaxed = relax(errors, prices, usable)
        if relaxed is None:
            raise RuntimeError(f"the choices bought exceed the budget of {budget} bytes")
        if relaxed.error < error:
            choice[window], error = relaxed.choice[1:], relaxed.error
        better, error, proven = improve(relaxed, error, _NODES)
        if better is not None:
            choice[window] = better[1:]
        beyond = lagrangian + float(margin[outside].min(initial=math.inf))
        bound = max(bound, min(proven, beyond))
        unproven = error - proven > gap * error  # HiGHS met its node limit: wider is harder
        if unproven or error - bound <= gap * error or not len(outside):
            break

    error = scale * math.fsum(energy * relative[matrix, choice])
    spent = int(cost[matrix, choice].sum())
    if spent > budget:
        raise RuntimeError(f"allocation spends {spent} of {budget} bytes")
    parts = list(torch.from_numpy(choice).split(sizes)) if sizes else []
    return Allocation(parts, error, min(scale * max(bound, 0.0), error), spent)


def _checked(
    energies: Sequence[Tensor], choices: Sequence[Choices], budget: int
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Ranks per matrix, all energies float64 `[N]`, the tables `[matrices, B]` of the largest B.

    Shorter tables are filled with the dropped rank at a price that no budget pays.
    """
    if len(energies) != len(choices):
        raise ValueError(f"{len(energies)} energies, but {len(choices)} tables of choices")
    if budget < 0:
        raise ValueError(f"the budget must not be negative, got {budget}")
    shape = len(choices), max((table.cost.numel() for table in choices), default=1)
    relative, cost = np.empty(shape), np.full(shape, _NEVER)
    ranks = [np.empty(0)]
    for j, (energies_j, table) in enumerate(zip(energies, choices, strict=True)):
        energy, error = (x.detach().double().cpu().numpy() for x in (energies_j, table.relative))
        price = table.cost.cpu().numpy()
        if energy.ndim != 1 or price.ndim != 1 or error.shape != price.shape or not price.size:
            raise ValueError(
                f"matrix {j}: energies must be [k], relative and cost [B], got "
                f"{list(energy.shape)}, {list(error.shape)} and {list(price.shape)}"
            )
        if price.dtype.kind not in "iu" or price[0] != 0 or (price < 0).any():
            raise ValueError(f"matrix {j}: costs must be integers >= 0, 0 for choice 0: {price}")
        if not all(np.isfinite(x).all() and (x >= 0).all() for x in (energy, error)):
            raise ValueError(f"matrix {j}: energies and relative must be finite, not negative")
        relative[j], relative[j, : error.size] = error[0], error
        cost[j, : price.size] = price
        ranks.append(energy)
    return [len(energy) for energy in ranks[1:]], np.concatenate(ranks), relative, cost
