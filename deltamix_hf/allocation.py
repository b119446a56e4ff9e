"""Choosing a width for every rank of one matrix under a byte budget.

`bands` is the published Delta-CoMe rule (arXiv 2406.08903): the 2 largest ranks at 8 bit, the next
32 at 3 bit, the rest at 2 bit until the budget is spent.

`solve` is the DeltaMix 0/1 program (arXiv 2506.11087) over an error table E `[k, B]`:

    min  sum_ib E_ib f_ib    s.t.  sum_b f_ib = 1 for each i,  sum_ib cost_ib f_ib <= budget,
                                   f_ib <= y_b,  sum_b y_b <= f_max   (only if f_max is given)

It is solved to proven optimality in four exact steps, because HiGHS alone needs seconds for one
matrix of 4096 ranks and its absolute tolerances do not suit tables that span 12 orders of
magnitude:

1. Linear relaxation in closed form. Walk each rank's lower convex hull from its cheapest choice;
   all hull steps of all ranks, sorted by error saved per byte, are bought until the budget is
   spent. The price of the marginal step is the multiplier L of the budget, and the Lagrangian
   sum_i min_b (E_ib + L cost_ib) - L budget bounds the optimum from below for ANY L >= 0, so the
   bound is certified whatever the rounding in the sort.
2. A good choice: the bought steps plus further steps that fit, in order.
3. Fixing by reduced cost r_ib = E_ib + L cost_ib - min_b'(...): a solution with f_ib = 1 costs at
   least bound + r_ib, so if that exceeds the error of step 2 the variable is 0. The two are so
   close on a large table that nearly every rank is left with one choice.
4. HiGHS solves the 0/1 program of the variables that are left, with the error written as
   bound + sum r f + L * (unspent bytes), so that every term is at most the remaining gap.

The y variables are enumerated: each set of f_max widths is bounded by step 1, sets are taken best
first, and a set whose bound exceeds the best error so far is never solved. Ties cost nothing extra
and the result is deterministic. Budgets are checked in integers after solving.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import torch

# Delta-CoMe's published bands: (ranks, bits); all further ranks are at the last width.
_BANDS = ((2, 8), (32, 3))
_LAST_WIDTH = 2

# HiGHS works on absolute tolerances of 1e-6 and more; one unit of gap is scaled to this.
_GAP_UNITS = 1e4

_HIGHS_OPTIONS = {
    "output_flag": False,
    "threads": 1,
    "random_seed": 0,
    "mip_rel_gap": 0.0,
    "mip_feasibility_tolerance": 1e-9,
    # Branching on the few z is all the search needs. Presolve, and the sub-MIP heuristics that
    # presolve again, took up to 13 s of one 13.4 s solve; without them the same took 0.2 s.
    "presolve": "off",
    "mip_heuristic_effort": 0.0,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_root_reduced_cost": False,
}

# An error within this fraction of its bound counts as optimal.
_PROVEN = 1e-10

# A first solve over the variables within a tenth of the gap nearly always finds the optimum, and
# the second then proves it over a gap that is several times smaller: 1.0 s, not 1.8 s, for 4096
# ranks (decay 1/rank, 1/16 of bf16; one Zen 4 core).
_REACHES = (0.1, 1.0)

# Single improvements tried on the greedy choice; a handful use up the rest of the budget.
_FILL_STEPS = 32


@dataclass(frozen=True)
class Allocation:
    """Widths int64 `[k]`, their total `error`, a proven lower `bound` on the best error, the
    relative `gap` (error - bound) / error, and the `seconds` the solve took."""

    bits: torch.Tensor
    error: float
    bound: float
    gap: float
    seconds: float


def bands(ranks: int, costs: Mapping[int, int], budget: int) -> torch.Tensor:
    """Delta-CoMe widths int64 `[ranks]` within `budget` bytes.

    `costs` are the bytes of one rank at 0 (0 if absent), 2, 3 and 8 bit. Bands are filled in
    order, so a budget too small for the published bands ends inside one; what a band cannot use
    goes to the next, cheaper one. Raises ValueError if even all ranks at 0 bit exceed the budget.
    """
    idle = costs.get(0, 0)
    left = budget - ranks * idle
    if left < 0:
        raise ValueError(f"a budget of {budget} bytes is below the {ranks * idle} of 0-bit ranks")
    bits = torch.zeros(ranks, dtype=torch.int64)
    filled = 0
    for count, width in (*_BANDS, (ranks, _LAST_WIDTH)):
        price = costs[width] - idle
        if price <= 0:
            raise ValueError(f"a {width}-bit rank must cost more than a 0-bit one: {dict(costs)}")
        taken = min(count, ranks - filled, left // price)
        bits[filled : filled + taken] = width
        filled, left = filled + taken, left - taken * price
    return bits


def solve(
    table: torch.Tensor,
    costs: torch.Tensor | Sequence,
    widths: Sequence[int],
    budget: int,
    f_max: int | None = None,
) -> Allocation:
    """Widths of least total error within `budget` bytes.

    `table` `[k, B]` errors >= 0, `costs` int bytes `[B]` or `[k, B]`, `widths` the B widths of the
    columns. With `f_max` at most that many distinct widths are used; 0 bit counts as one. Raises
    ValueError if the cheapest choice exceeds the budget, or for shapes or values out of range.
    """
    started = time.perf_counter()
    errors = np.ascontiguousarray(torch.as_tensor(table).cpu().numpy(), dtype=np.float64)
    if errors.ndim != 2 or errors.shape[1] != len(widths):
        raise ValueError(f"table {list(errors.shape)} does not match {len(widths)} widths")
    prices = np.asarray(torch.as_tensor(costs).cpu().numpy())
    if prices.dtype.kind not in "iu" or prices.shape not in (errors.shape, errors.shape[1:]):
        raise ValueError(f"costs must be integers [B] or [k, B], got {prices.dtype} {prices.shape}")
    prices = np.broadcast_to(prices.astype(np.int64), errors.shape)
    if not np.isfinite(errors).all() or (errors < 0).any() or (prices < 0).any():
        raise ValueError("errors and costs must be finite and not negative")
    if f_max is not None and f_max < 1:
        raise ValueError(f"f_max must be at least 1, got {f_max}")
    scale = errors.max(initial=0.0) or 1.0
    size = len(widths) if f_max is None else min(f_max, len(widths))
    parts = []
    for subset in itertools.combinations(range(len(widths)), size):
        chosen = list(subset)
        relaxed = _relax(errors[:, chosen] / scale, prices[:, chosen], int(budget))
        if relaxed is not None:
            parts.append((chosen, relaxed))
    if not parts:
        least = int(prices.min(axis=1).sum())
        limit = "" if f_max is None else f" with at most {f_max} widths"
        raise ValueError(f"a budget of {budget} bytes cannot pay any choice{limit} (least {least})")
    parts.sort(key=lambda part: part[1].bound)
    best = min(part[1].error for part in parts)
    columns, choice = next((c, r.choice) for c, r in parts if r.error == best)
    bound = math.inf
    for chosen, relaxed in parts:
        if relaxed.bound >= best:
            bound = min(bound, best)
            continue
        for reach in _REACHES:
            if best - relaxed.bound <= _PROVEN * best:
                proven = relaxed.bound
                break
            found, proven = _solve_core(relaxed, best, int(budget), reach)
            if found is not None:
                columns, (choice, best) = chosen, found
        bound = min(bound, proven)
    picked = np.asarray(columns)[choice]
    rows = np.arange(len(errors))
    if prices[rows, picked].sum() > budget:
        raise AssertionError("allocation over budget")
    error = math.fsum(errors[rows, picked])
    bound = max(0.0, min(bound * scale, error))
    return Allocation(
        bits=torch.as_tensor(np.asarray(widths, dtype=np.int64)[picked]),
        error=error,
        bound=bound,
        gap=(error - bound) / error if error > 0 else 0.0,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Relaxed:
    errors: np.ndarray  # [k, B]
    prices: np.ndarray  # [k, B]
    choice: np.ndarray  # [k], a choice within the budget
    error: float  # of that choice
    bound: float  # Lagrangian lower bound
    multiplier: float  # of the budget
    reduced: np.ndarray  # [k, B] reduced costs >= 0


def _relax(errors: np.ndarray, prices: np.ndarray, budget: int) -> _Relaxed | None:
    """Steps 1 and 2; None if the cheapest choice exceeds the budget."""
    rows = np.arange(len(errors))
    # Cheapest choice, of equal ones the least error.
    current = np.lexsort((errors, prices), axis=1)[:, 0]
    left = budget - int(prices[rows, current].sum())
    if left < 0:
        return None
    steps, slopes = [], []
    choice = current.copy()
    for _ in range(errors.shape[1] - 1):
        saved = errors[rows, current][:, None] - errors
        added = prices - prices[rows, current][:, None]
        valid = (saved > 0) & (added > 0)
        slope = np.where(valid, saved / np.where(valid, added, 1), 0.0)
        # Steepest step; of equal ones the longest, so collinear points are one step.
        step = np.lexsort((-added, -slope), axis=1)[:, 0]
        gain = slope[rows, step]
        # Rounding may lift a later slope above an earlier one; order within a rank must hold.
        slopes.append(np.minimum(gain, slopes[-1]) if slopes else gain)
        steps.append(np.where(gain > 0, step, current))
        current = steps[-1]
    multiplier = 0.0
    if steps:
        gains = np.stack(slopes, axis=1)  # [k, B - 1], descending along each row
        path = np.stack([choice, *steps], axis=1)  # [k, B]
        order = np.flatnonzero(gains.ravel() > 0)
        order = order[np.argsort(-gains.ravel()[order], kind="stable")]
        rank, depth = np.divmod(order, gains.shape[1])
        extra = prices[rank, path[rank, depth + 1]] - prices[rank, path[rank, depth]]
        bought = int(np.searchsorted(np.cumsum(extra), left, side="right"))
        choice = path[rows, np.bincount(rank[:bought], minlength=len(errors))]
        left -= int(extra[:bought].sum())
        if bought < len(order):
            multiplier = float(gains.ravel()[order[bought]])
    for _ in range(_FILL_STEPS):
        saved = errors[rows, choice][:, None] - errors
        saved[prices - prices[rows, choice][:, None] > left] = 0.0
        best = int(saved.argmax()) if saved.size else 0
        if not saved.size or saved.flat[best] <= 0:
            break
        i, b = divmod(best, errors.shape[1])
        left -= int(prices[i, b] - prices[i, choice[i]])
        choice[i] = b
    priced = errors + multiplier * (prices - prices.min(axis=1, keepdims=True))
    least = priced.min(axis=1)
    slack = budget - int(prices.min(axis=1).sum())
    return _Relaxed(
        errors=errors,
        prices=prices,
        choice=choice,
        error=math.fsum(errors[rows, choice]),
        bound=math.fsum(least) - multiplier * slack,
        multiplier=multiplier,
        reduced=priced - least[:, None],
    )


def _solve_core(
    relaxed: _Relaxed, best: float, budget: int, reach: float
) -> tuple[tuple[np.ndarray, float] | None, float]:
    """Steps 3 and 4: a better (choice, error) than `best` or None, and a lower bound.

    Only variables with a reduced cost up to `reach` times the gap are left free, so the bound is
    proven for `reach` >= 1 alone.
    """
    gap = best - relaxed.bound
    keep = relaxed.reduced <= reach * gap + 1e-12 * best
    if not keep.any(axis=1).all():
        return None, best
    choice = keep.argmax(axis=1)
    free = np.flatnonzero(keep.sum(axis=1) > 1)
    fixed = np.delete(np.arange(len(keep)), free)
    left = budget - int(relaxed.prices[fixed, choice[fixed]].sum())
    row, column = np.divmod(np.flatnonzero(keep[free].ravel()), keep.shape[1])
    proven = best
    if len(free):
        unit = gap / _GAP_UNITS
        solution, least = _run_highs(
            relaxed.reduced[free][row, column] / unit,
            row,
            relaxed.prices[free][row, column],
            left,
            relaxed.multiplier / unit,
            _PROVEN * best / unit,
        )
        proven = min(best, relaxed.bound + least * unit)
        if solution is None:
            return None, proven
        picked = np.flatnonzero(solution > 0.5)
        choice[free[row[picked]]] = column[picked]
    # HiGHS works with tolerances: the budget is checked in integers.
    rows = np.arange(len(choice))
    error = math.fsum(relaxed.errors[rows, choice])
    if int(relaxed.prices[rows, choice].sum()) > budget or error >= best:
        return None, proven
    return (choice, error), proven


def _run_highs(
    cost: np.ndarray,
    row: np.ndarray,
    price: np.ndarray,
    budget: int,
    slack_cost: float,
    tolerance: float,
) -> tuple[np.ndarray | None, float]:
    """One choice f per rank `row` and the unspent bytes, of least cost: f and the dual bound.

    With z_p = the number of choices at price p, the constraints on f for given z are those of a
    transportation problem, whose vertices are 0/1. So only the z (one per width, not one per rank
    and width) are integer variables: 4096 ranks take 0.1-1 s, and over 10 s with integer f.
    """
    prices, group = np.unique(price, return_inverse=True)
    count, ranks, kinds = len(row), int(row.max()) + 1, len(prices)
    divisor = int(np.gcd.reduce(prices)) or 1
    capacity = budget // divisor  # the remainder can never be spent
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count + kinds + 1, ranks + kinds + 1
    lp.col_cost_ = np.concatenate([cost, np.zeros(kinds), [slack_cost * divisor]])
    lp.col_lower_ = np.zeros(count + kinds + 1)
    lp.col_upper_ = np.concatenate([np.ones(count), np.bincount(group), [float(capacity)]])
    lp.row_lower_ = lp.row_upper_ = np.concatenate(
        [np.ones(ranks), np.zeros(kinds), [float(capacity)]]
    )
    # Column-wise: f in its rank's row and its price's row, z in its price's row and the budget.
    rows = [np.stack([row, ranks + group]), ranks + np.stack([np.arange(kinds), [kinds] * kinds])]
    values = [np.ones((2, count)), np.stack([-np.ones(kinds), prices / divisor])]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.append(np.arange(count + kinds + 1) * 2, 2 * (count + kinds) + 1)
    lp.a_matrix_.index_ = np.append(np.concatenate(rows, axis=1).T.ravel(), ranks + kinds)
    lp.a_matrix_.value_ = np.append(np.concatenate(values, axis=1).T.ravel(), 1.0)
    real, whole = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    lp.integrality_ = [real] * count + [whole] * kinds + [real]
    solver = highspy.Highs()
    for name, value in _HIGHS_OPTIONS.items():
        solver.setOptionValue(name, value)
    solver.setOptionValue("mip_abs_gap", tolerance)
    solver.passModel(lp)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None, math.inf
    if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kSolutionLimit):
        raise RuntimeError(f"HiGHS ended with {solver.modelStatusToString(status)}")
    bound = info.mip_dual_bound + slack_cost * (budget % divisor)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, bound
    solution = np.asarray(solver.getSolution().col_value)
    if np.abs(solution[:count] - solution[:count].round()).max() > 1e-6:
        # A tie ended between vertices: the linear program with z fixed ends at one.
        counts = solution[count : count + kinds].round()
        lp.col_lower_ = np.concatenate([np.zeros(count), counts, [0.0]])
        lp.col_upper_ = np.concatenate([np.ones(count), counts, [float(capacity)]])
        lp.integrality_ = [real] * (count + kinds + 1)
        solver.passModel(lp)
        solver.setOptionValue("solver", "simplex")
        solver.run()
        solution = np.asarray(solver.getSolution().col_value)
    return solution[:count], bound
