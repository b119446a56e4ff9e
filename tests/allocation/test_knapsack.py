import itertools
import subprocess
import sys

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamix_hf.allocation import knapsack
from deltamix_hf.allocation.per_matrix import solve


def direct(errors, prices, budget, f_max=None):
    """The published 0/1 program as it stands, y variables included, by HiGHS."""
    k, b = errors.shape
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("mip_rel_gap", 0.0)
    f = [[model.addBinary(obj=float(errors[i, j])) for j in range(b)] for i in range(k)]
    for row in f:
        model.addConstr(sum(row) == 1)
    model.addConstr(sum(int(prices[i, j]) * f[i][j] for i in range(k) for j in range(b)) <= budget)
    if f_max is not None:
        y = [model.addBinary() for _ in range(b)]
        model.addConstr(sum(y) <= f_max)
        for i, j in itertools.product(range(k), range(b)):
            model.addConstr(f[i][j] <= y[j])
    model.run()
    return model.getInfo().objective_function_value


def instance(seed, k=30, b=4):
    generator = np.random.default_rng(seed)
    errors = np.sort(generator.random((k, b)) ** 3, axis=1)[:, ::-1].copy()
    prices = np.broadcast_to(np.sort(generator.integers(0, 300, b)), (k, b))
    return errors, prices, int(prices.max(1).sum() * generator.uniform(0.2, 0.8))


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_program_as_it_stands(seed):
    errors, prices, budget = instance(seed)
    relaxed = knapsack.relax(errors, prices, budget)
    if relaxed is None:
        assert prices.min(1).sum() > budget
        return
    _, best, bound = knapsack.improve(relaxed, relaxed.error)
    assert best == pytest.approx(direct(errors, prices, budget), rel=1e-6)
    assert best - bound <= 1e-9 * best


@pytest.mark.parametrize("f_max", [1, 2, 3])
def test_enumerating_widths_equals_the_y_variables(f_max):
    errors, prices, budget = instance(3, k=15)
    found = solve(errors, prices[0].tolist(), budget, f_max)
    assert found.error == pytest.approx(direct(errors, prices, budget, f_max), rel=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_relaxation_brackets_the_optimum(seed, share):
    generator = np.random.default_rng(seed)
    errors, prices = generator.random((4, 3)), generator.integers(0, 9, (4, 3))
    budget = int(share * prices.max(1).sum())
    choices = np.array(list(itertools.product(range(3), repeat=4)))
    rows = np.arange(4)
    totals = errors[rows, choices].sum(1)[prices[rows, choices].sum(1) <= budget]
    relaxed = knapsack.relax(errors, prices, budget)
    if not len(totals):
        assert relaxed is None
        return
    assert relaxed.bound <= totals.min() + 1e-12 and relaxed.error >= totals.min() - 1e-12
    assert prices[rows, relaxed.choice].sum() <= budget
    assert (relaxed.reduced >= 0).all()


@given(seed=st.integers(0, 10**6), b=st.integers(1, 6), ties=st.booleans())
def test_hull_is_the_lower_convex_one(seed, b, ties):
    """From the cheapest choice on: steeper steps first, and no choice lies below them."""
    generator = np.random.default_rng(seed)
    errors = generator.integers(0, 5, (4, b)).astype(float) if ties else generator.random((4, b))
    prices = generator.integers(0, 9, (4, b))
    start = np.lexsort((errors, prices), axis=1)[:, 0]
    hull = knapsack.hull(errors, prices)
    path, slopes = hull.path, hull.slopes
    assert path.shape == (4, b) and slopes.shape == (4, b - 1)
    assert (path[:, 0] == start).all() and (np.diff(slopes, axis=1) <= 0).all()
    for i in range(4):
        steps = int((slopes[i] > 0).sum())
        walked = path[i, : steps + 1]
        assert (path[i, steps:] == walked[-1]).all()  # it stays where it ends
        price, error = prices[i, walked], errors[i, walked]
        assert price[0] == hull.cheapest[i] and (np.diff(price) == hull.steps[i, :steps]).all()
        assert (np.diff(price) > 0).all() and error[-1] == errors[i].min()
        found = -np.diff(error) / np.diff(price)
        assert found == pytest.approx(slopes[i, :steps])
        below = np.interp(prices[i], price, error)
        assert (errors[i] >= below - 1e-12).all()


@pytest.fixture
def equal_ranks():
    """Every rank offers the same choices, so optimal faces of the relaxation are large."""
    errors = np.tile([1.0, 0.31, 0.3, 0.05], (200, 1))
    prices = np.tile([0, 7, 8, 21], (200, 1))
    return errors, prices


def optimum(errors, prices, budget, **how):
    relaxed = knapsack.relax(errors, prices, budget)
    choice, best, bound = knapsack.improve(relaxed, relaxed.error, **how)
    choice = relaxed.choice if choice is None else choice
    rows = np.arange(len(errors))
    assert prices[rows, choice].sum() <= budget
    assert errors[rows, choice].sum() == pytest.approx(best)
    assert bound <= best
    return best, bound


@pytest.mark.parametrize("budget", [333, 1000, 2222])
def test_ties(equal_ranks, budget):
    best, bound = optimum(*equal_ranks, budget)
    assert best - bound <= 1e-9 * best


def test_a_fractional_optimum_is_moved_to_a_vertex(equal_ranks, monkeypatch):
    spread = []

    class Spreading(knapsack.Solver):
        """Gives the average of the equivalent solutions, which HiGHS may do on ties."""

        def getSolution(self):
            solution = super().getSolution()
            values = np.array(solution.col_value)
            if self.getLp().integrality_ and highspy.HighsVarType.kInteger in (
                self.getLp().integrality_
            ):
                matrix = self.getLp().a_matrix_
                kinds = sum(
                    kind == highspy.HighsVarType.kInteger for kind in self.getLp().integrality_
                )
                count = len(values) - kinds - 1
                group = np.asarray(matrix.index_)[1 : 2 * count : 2]
                for kind in np.unique(group):
                    values[:count][group == kind] = values[:count][group == kind].mean()
                spread.append(values)
                solution.col_value = values
            return solution

    expected = optimum(*equal_ranks, 1000)
    monkeypatch.setattr(knapsack, "Solver", Spreading)
    assert optimum(*equal_ranks, 1000) == pytest.approx(expected)
    assert any((values % 1 > 0.01).any() for values in spread)


def test_an_unfinished_search_reports_its_gap():
    generator = np.random.default_rng(5)
    errors = np.sort(generator.integers(0, 4, (300, 3)), axis=1)[:, ::-1].astype(float)
    prices = generator.integers(0, 40, (300, 3))
    gaps = []
    for share in (0.3, 0.4, 0.5, 0.6):
        low, high = prices.min(1).sum(), prices.max(1).sum()
        best, bound = optimum(errors, prices, int(low + share * (high - low)), nodes=1)
        gaps.append(best - bound)
    assert max(gaps) > 0


def test_nothing_is_returned_above_a_better_error():
    errors, prices, budget = instance(1)
    relaxed = knapsack.relax(errors, prices, budget)
    _, best, _ = knapsack.improve(relaxed, relaxed.error)
    choice, error, bound = knapsack.improve(relaxed, best * (1 - 1e-6))
    assert choice is None and error == best * (1 - 1e-6) and bound <= error


def test_highs_prints_nothing():
    """In a process of its own: HiGHS 1.16 prints its name when the first solver is made."""
    code = (
        "from deltamix_hf.allocation.knapsack import Solver; s = Solver(); s.addVar(0, 1); s.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
