"""Multiple-choice knapsack to proven optimality: one choice per rank, integer prices, one budget.

    min  sum_ib E_ib f_ib    s.t.  sum_b f_ib = 1 for each i,   sum_ib price_ib f_ib <= budget

HiGHS alone takes from seconds to minutes for one matrix of 4096 ranks, and its absolute tolerances
do not suit error tables that span 12 orders of magnitude. Four exact steps avoid both:

1. The linear relaxation in closed form: the steps of the ranks' lower convex hulls, by error saved
   per byte, are bought until the budget is spent. The slope of the first that does not fit is the
   multiplier L of the budget; the Lagrangian  sum_i min_b (E_ib + L price_ib) - L budget  bounds
   the optimum from below for ANY L >= 0, so whatever rounding did to the sort.
2. A good choice: the bought steps, then single improvements that still fit.
3. Fixing by reduced cost, r_ib = E_ib + L price_ib - min_b'(E_ib' + L price_ib'). A solution with
   f_ib = 1 has at least the error bound + r_ib; if that exceeds the best known error, f_ib = 0.
4. HiGHS on the variables that are left, with the error written as
   bound + sum r f + L * (unspent bytes), so that every term is at most the remaining gap.
"""

import math
from dataclasses import dataclass

import highspy
import numpy as np
from torch import Tensor

# HiGHS works on absolute tolerances; the gap between best and bound is scaled to this many units.
_GAP_UNITS = 1e4
# An error within this fraction of its bound counts as optimal.
_PROVEN = 1e-10
# Single improvements tried on the greedy choice; a handful use up the rest of the budget.
_FILL_STEPS = 32
# A first solve within a tenth of the gap nearly always finds the optimum; the second then proves it
# over a gap that is several times smaller.
_REACHES = (0.1, 1.0)
# A deterministic stop for tables full of ties; the gap is then reported. Others needed <= 3025.
_MOST_NODES = 20000
_HIGHS_OPTIONS: dict[str, bool | int | float | str] = {
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


class Solver(highspy.Highs):
    """HiGHS in silence: 1.16 prints its name in the constructor, by this call."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


@dataclass(frozen=True)
class Allocation:
    """The choice of each rank, int64 `[k]` per matrix, and the bytes they take together.

    `error` is their total error, `bound` a proven lower bound on the least possible.
    """

    choice: list[Tensor]
    error: float
    bound: float
    spent: int

    @property
    def gap(self) -> float:
        """(error - bound) / error, not negative."""
        return (self.error - self.bound) / self.error if self.error > self.bound else 0.0


@dataclass(frozen=True)
class Hull:
    """Lower convex hulls of tables of choices: walks from the cheapest choice of each."""

    cheapest: np.ndarray  # int64 [tables], price of the first choice
    path: np.ndarray  # int64 [tables, B], the choices
    slopes: np.ndarray  # float64 [tables, B - 1], error saved per byte; they descend, 0 is the end
    steps: np.ndarray  # int64 [tables, B - 1], bytes of each step


def hull(errors: np.ndarray, prices: np.ndarray) -> Hull:
    """Walk the hulls of the rows of `errors` float64 and `prices` int64 `[tables, B]`."""
    rows = np.arange(len(errors))
    # The cheapest choice, of equally cheap ones the best.
    path = [np.lexsort((errors, prices), axis=1)[:, 0]]
    slopes = np.zeros((len(errors), errors.shape[1] - 1))
    for step in range(slopes.shape[1]):
        current = path[-1]
        saved = errors[rows, current][:, None] - errors
        added = prices - prices[rows, current][:, None]
        valid = (saved > 0) & (added > 0)
        slope = np.where(valid, saved / np.where(valid, added, 1), 0.0)
        # The steepest step; of equal ones the longest, so that collinear points are one step.
        steepest = np.lexsort((-added, -slope), axis=1)[:, 0]
        gain = slope[rows, steepest]
        path.append(np.where(gain > 0, steepest, current))
        # Rounding may lift a later slope above an earlier one; the order in a rank must hold.
        slopes[:, step] = np.minimum(gain, slopes[:, step - 1]) if step else gain
    walk = np.stack(path, axis=1)
    price = np.take_along_axis(prices, walk, axis=1)
    return Hull(price[:, 0], walk, slopes, np.diff(price, axis=1))


def buy(
    hulls: Hull, energy: np.ndarray, table: np.ndarray, budget: int
) -> tuple[np.ndarray, float]:
    """Step 1: the choice of each rank, int64 `[k]`, and the multiplier of the budget.

    Rank i walks the hull of row `table[i]`, its errors are `energy[i]` times those of the row.
    The cheapest choices of all ranks must fit the budget.
    """
    budget = budget - int(hulls.cheapest[table].sum())
    depth = int(hulls.slopes.any(axis=0).sum())
    slope = (energy[:, None] * hulls.slopes[table, :depth]).ravel()
    order = np.flatnonzero(slope > 0)
    order = order[np.argsort(-slope[order], kind="stable")]
    rank, step = np.divmod(order, max(depth, 1))
    spent = np.cumsum(hulls.steps[table[rank], step])
    count = int(np.searchsorted(spent, budget, side="right"))
    choice = hulls.path[table, np.bincount(rank[:count], minlength=len(energy))]
    return choice, float(slope[order[count]]) if count < len(order) else 0.0


@dataclass(frozen=True)
class Relaxed:
    """A solved relaxation: `choice` `[k]` keeps the budget and has `error`; `bound` is proven."""

    errors: np.ndarray  # float64 [k, B]
    prices: np.ndarray  # int64 [k, B]
    budget: int
    choice: np.ndarray  # int64 [k]
    error: float
    bound: float
    multiplier: float
    reduced: np.ndarray  # float64 [k, B], reduced costs >= 0


def relax(errors: np.ndarray, prices: np.ndarray, budget: int) -> Relaxed | None:
    """Steps 1 and 2 for `errors` and int64 `prices` `[k, B]`; None if nothing fits the budget."""
    rows, cheapest = np.arange(len(errors)), prices.min(axis=1)
    if cheapest.sum() > budget:
        return None
    choice, multiplier = buy(hull(errors, prices), np.ones(len(errors)), rows, budget)
    left = budget - int(prices[rows, choice].sum())
    for _ in range(_FILL_STEPS if errors.size else 0):
        saved = errors[rows, choice][:, None] - errors
        saved[prices - prices[rows, choice][:, None] > left] = 0.0
        i, b = divmod(int(saved.argmax()), errors.shape[1])
        if saved[i, b] <= 0:
            break
        left -= int(prices[i, b] - prices[i, choice[i]])
        choice[i] = b
    priced = errors + multiplier * (prices - cheapest[:, None])
    least, error = priced.min(axis=1), math.fsum(errors[rows, choice])
    bound = math.fsum(least) - multiplier * (budget - int(cheapest.sum()))
    reduced = priced - least[:, None]
    return Relaxed(errors, prices, budget, choice, error, bound, multiplier, reduced)


def improve(
    relaxed: Relaxed, best: float, nodes: int = _MOST_NODES
) -> tuple[np.ndarray | None, float, float]:
    """Steps 3 and 4: the optimal choice `[k]` if its error is below `best`, that error, a bound.

    Returns (None, best, bound) if no choice is better than `best`, which may come from elsewhere.
    `nodes` limits each of HiGHS's two searches.
    """
    choice, bound = None, relaxed.bound
    for reach in _REACHES:
        if best - relaxed.bound <= _PROVEN * best:
            return choice, best, relaxed.bound
        found, bound = _solve_core(relaxed, best, reach, nodes)
        if found is not None:
            choice, best = found
    return choice, best, bound


def _solve_core(
    relaxed: Relaxed, best: float, reach: float, nodes: int
) -> tuple[tuple[np.ndarray, float] | None, float]:
    """A better (choice, error) than `best` or None, and a lower bound.

    Variables are free up to `reach` times the gap, so the bound is proven only for reach >= 1.
    """
    gap = best - relaxed.bound
    keep = relaxed.reduced <= reach * gap + 1e-12 * best
    if not keep.any(axis=1).all():
        return None, best
    choice = keep.argmax(axis=1)
    free = np.flatnonzero(keep.sum(axis=1) > 1)
    bound = best
    if len(free):
        fixed = np.delete(np.arange(len(keep)), free)
        row, column = np.divmod(np.flatnonzero(keep[free].ravel()), keep.shape[1])
        unit = gap / _GAP_UNITS
        solution, least = _run_highs(
            relaxed.reduced[free][row, column] / unit,
            row,
            relaxed.prices[free][row, column],
            relaxed.budget - int(relaxed.prices[fixed, choice[fixed]].sum()),
            relaxed.multiplier / unit,
            _PROVEN * best / unit,
            nodes,
        )
        bound = min(best, relaxed.bound + max(least, 0.0) * unit)
        if solution is None:
            return None, bound
        picked = np.flatnonzero(solution > 0.5)
        choice[free[row[picked]]] = column[picked]
    # HiGHS works with tolerances: the budget is checked in integers.
    rows = np.arange(len(choice))
    error = math.fsum(relaxed.errors[rows, choice])
    better = error < best and int(relaxed.prices[rows, choice].sum()) <= relaxed.budget
    return (choice, error) if better else None, bound


def _run_highs(
    cost: np.ndarray,
    row: np.ndarray,
    price: np.ndarray,
    budget: int,
    slack_cost: float,
    tolerance: float,
    nodes: int,
) -> tuple[np.ndarray | None, float]:
    """One choice f per rank `row` and the unspent bytes, of least cost: f and the dual bound.

    With z_p = the number of choices at price p, the constraints on f for given z are those of a
    transportation problem, whose vertices are 0/1. So only the z (one per width, not one per rank
    and width) are integer variables: 4096 ranks take 0.2-1 s, and over 10 s with integer f.
    """
    prices, group = np.unique(price, return_inverse=True)
    count, ranks, kinds = len(row), int(row.max()) + 1, len(prices)
    divisor = int(np.gcd.reduce(prices)) or 1
    capacity = float(budget // divisor)  # the remainder can never be spent
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count + kinds + 1, ranks + kinds + 1
    lp.col_cost_ = np.concatenate([cost, np.zeros(kinds), [slack_cost * divisor]])
    lp.col_lower_ = np.zeros(count + kinds + 1)
    lp.col_upper_ = np.concatenate([np.ones(count), np.bincount(group), [capacity]])
    lp.row_lower_ = np.concatenate([np.ones(ranks), np.zeros(kinds), [capacity]])
    lp.row_upper_ = lp.row_lower_
    # Column-wise: f in its rank's row and its price's row, z in its price's row and the budget.
    rows = [np.stack([row, ranks + group]), ranks + np.stack([np.arange(kinds), [kinds] * kinds])]
    values = [np.ones((2, count)), np.stack([-np.ones(kinds), prices / divisor])]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.append(np.arange(count + kinds + 1) * 2, 2 * (count + kinds) + 1)
    lp.a_matrix_.index_ = np.append(np.concatenate(rows, axis=1).T.ravel(), ranks + kinds)
    lp.a_matrix_.value_ = np.append(np.concatenate(values, axis=1).T.ravel(), 1.0)
    real, whole = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    lp.integrality_ = [real] * count + [whole] * kinds + [real]
    solver = Solver()
    for name, value in _HIGHS_OPTIONS.items():
        solver.setOptionValue(name, value)
    solver.setOptionValue("mip_abs_gap", tolerance)
    solver.setOptionValue("mip_max_nodes", nodes)
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
        lp.col_upper_ = np.concatenate([np.ones(count), counts, [capacity]])
        lp.integrality_ = [real] * (count + kinds + 1)
        solver.passModel(lp)
        solver.setOptionValue("solver", "simplex")
        solver.run()
        solution = np.asarray(solver.getSolution().col_value)
    return solution[:count], bound
