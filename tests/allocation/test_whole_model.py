import itertools
import math

import highspy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamix_hf.allocation import per_matrix, whole_model
from deltamix_hf.allocation.whole_model import Choices, solve_global

WIDTHS = (2, 3, 4, 8)


def brute_force(energies, choices, budget):
    """Least error of all combinations within the budget."""
    ranks = [(float(h), t) for energy, t in zip(energies, choices, strict=True) for h in energy]
    best = math.inf
    for picked in itertools.product(*(range(len(t.cost)) for _, t in ranks)):
        pairs = list(zip(ranks, picked, strict=True))
        if sum(int(t.cost[b]) for (_, t), b in pairs) <= budget:
            best = min(best, math.fsum(h * float(t.relative[b]) for (h, t), b in pairs))
    return best


def recount(energies, choices, found):
    """Error and bytes of the choices, from the definition."""
    parts = list(zip(energies, choices, found.choice, strict=True))
    error = math.fsum(float((e.double() * t.relative[c]).sum()) for e, t, c in parts)
    return error, sum(int(t.cost[c].sum()) for _, t, c in parts)


@st.composite
def small_models(draw):
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["wide", "ties", "zeros", "smooth"]))
    top = draw(st.sampled_from([3, 30, 10**6]))
    energies, choices, most = [], [], 0
    left = 6
    for _ in range(draw(st.integers(1, 3))):
        k = draw(st.integers(0, min(3, left)))
        left -= k
        if kind == "wide":
            energy = 10.0 ** generator.uniform(-12, 3, k)
        elif kind == "ties":
            energy = generator.integers(0, 3, k).astype(float)
        else:
            energy = generator.random(k) * (generator.integers(0, 2, k) if kind == "zeros" else 1)
        b = draw(st.integers(1, 4))
        relative = np.concatenate([[draw(st.sampled_from([1.0, 1.5]))], generator.random(b - 1)])
        cost = np.concatenate([[0], generator.integers(0, top, b - 1)])
        energies.append(torch.tensor(np.sort(energy)[::-1].copy()))
        choices.append(Choices(torch.tensor(relative), torch.tensor(cost)))
        most += k * int(cost.max())
    return energies, choices, draw(st.integers(0, most + 1))


@settings(max_examples=200, deadline=None)
@given(small_models())
def test_equals_brute_force_and_keeps_the_budget(case):
    energies, choices, budget = case
    found = solve_global(energies, choices, budget)
    assert [len(c) for c in found.choice] == [len(e) for e in energies]
    error, spent = recount(energies, choices, found)
    assert spent == found.spent <= budget
    assert math.isclose(found.error, error, rel_tol=1e-12)
    assert 0 <= found.bound <= found.error and 0 <= found.gap <= 1e-9
    assert math.isclose(error, brute_force(energies, choices, budget), rel_tol=1e-9, abs_tol=1e-300)


def model(matrices, ranks, seed=0):
    """Power-law energies, pairs of widths for V and U, and 1/16 of the bf16 bytes."""
    generator = np.random.default_rng(seed)
    energies, choices, budget = [], [], 0
    for j in range(matrices):
        rows, columns = ((ranks, ranks), (ranks * 43 // 16, ranks))[j % 2]
        decay, level, noise = generator.uniform((0.3, -4, 1), (2.5, 0, 2))
        power = np.arange(1, ranks + 1.0) ** -decay
        energies.append(torch.tensor(power * 10.0**level))
        pairs = list(itertools.product(WIDTHS, WIDTHS))
        left = {b: noise * 2.0**-b / b for b in WIDTHS}
        relative = [1.0, *(1 - (1 - left[v]) * (1 - left[u]) for v, u in pairs)]
        cost = [0, *(v * columns // 8 + u * rows // 8 + 6 for v, u in pairs)]
        choices.append(Choices(torch.tensor(relative), torch.tensor(cost)))
        budget += rows * columns // 8
    return energies, choices, budget


@pytest.mark.untraced
@pytest.mark.parametrize(("matrices", "ranks"), [(1, 64), (5, 40), (16, 128), (16, 4096)])
def test_models_are_solved_within_a_certified_gap(matrices, ranks):
    energies, choices, budget = model(matrices, ranks)
    found = solve_global(energies, choices, budget)
    error, spent = recount(energies, choices, found)
    assert spent == found.spent <= budget
    # All but the price of one rank is spent.
    assert spent > budget - max(int(table.cost.max()) for table in choices)
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.error >= found.bound and found.gap <= 1e-4


def relaxation(energies, choices, budget):
    """The linear relaxation by HiGHS: a column for each rank and choice, no hull, no multiplier."""
    cost = np.concatenate([np.outer(e, t.relative) for e, t in zip(energies, choices, strict=True)])
    price = np.concatenate(
        [t.cost.expand(len(e), -1) for e, t in zip(energies, choices, strict=True)]
    )
    ranks, kinds = cost.shape
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = cost.size, ranks + 1
    lp.col_cost_ = cost.ravel() / cost.mean()
    lp.col_lower_, lp.col_upper_ = np.zeros(cost.size), np.ones(cost.size)
    lp.row_lower_ = np.append(np.ones(ranks), -highspy.kHighsInf)
    lp.row_upper_ = np.append(np.ones(ranks), 1.0)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(cost.size + 1) * 2
    row = np.repeat(np.arange(ranks), kinds)
    lp.a_matrix_.index_ = np.stack([row, np.full(cost.size, ranks)], axis=1).ravel()
    lp.a_matrix_.value_ = np.stack([np.ones(cost.size), price.ravel() / budget], axis=1).ravel()
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return solver.getInfo().objective_function_value * cost.mean()


@pytest.mark.parametrize("seed", range(3))
def test_lies_just_above_the_whole_relaxation_by_highs(seed):
    energies, choices, budget = model(6, 100, seed)
    least = relaxation(energies, choices, budget)
    found = solve_global(energies, choices, budget)
    assert least * (1 - 1e-7) <= found.bound <= found.error <= least * (1 + 1e-3)


@pytest.mark.parametrize("ranks", [20, 300, 1000])
def test_agrees_with_the_program_of_one_matrix(ranks):
    (energy,), (table,), budget = model(1, ranks, seed=ranks)
    table = Choices(table.relative[:6], table.cost[:6])
    single = per_matrix.solve(energy[:, None] * table.relative, table.cost, budget)
    found = solve_global([energy], [table], budget)
    assert found.error == pytest.approx(single.error, rel=1e-9)


def test_is_deterministic_and_ignores_scale_and_order_of_energies():
    energies, choices, budget = model(4, 100)
    first = solve_global(energies, choices, budget)
    again = solve_global(energies, choices, budget)
    scaled = solve_global([e * 2.0**-80 for e in energies], choices, budget)
    for other in (again, scaled):
        for a, b in zip(first.choice, other.choice, strict=True):
            assert torch.equal(a, b)
    assert scaled.error == pytest.approx(first.error * 2.0**-80, rel=1e-12)
    turned = solve_global([e.flip(0) for e in energies], choices, budget)
    assert turned.error == pytest.approx(first.error, rel=1e-6)


def test_a_wider_window_is_taken_when_the_first_does_not_prove_enough(monkeypatch):
    opened = []
    improve = whole_model.improve

    def recorded(relaxed, best, nodes):
        opened.append(len(relaxed.errors) - 1)
        return improve(relaxed, best, nodes)

    monkeypatch.setattr(whole_model, "improve", recorded)
    energies, choices, budget = model(2, 100)
    assert solve_global(energies, choices, budget).gap <= 1e-6
    assert opened[0] == 16 and opened == sorted(opened)
    opened.clear()
    solve_global([torch.ones(9)], choices[:1], budget)
    assert opened == [9]  # all ranks are open: nothing wider to try
    opened.clear()
    assert solve_global(energies, choices, budget, gap=1.0).gap <= 1e-3
    assert opened == [16]


def test_ranks_that_differ_by_fifteen_orders_of_magnitude():
    energies, choices, budget = model(8, 200)
    energies = [10.0 ** torch.linspace(3, -12, len(e), dtype=torch.float64) for e in energies]
    found = solve_global(energies, choices, budget)
    assert found.spent <= budget and found.gap <= 1e-6


def test_equal_energies():
    _, choices, budget = model(8, 200)
    found = solve_global([torch.ones(200)] * 8, choices, budget)
    assert found.spent <= budget and found.gap <= 1e-4


def test_budgets_that_pay_nothing_or_everything():
    energies, choices, _ = model(3, 50)
    least = min(int(table.cost[1:].min()) for table in choices)
    nothing = solve_global(energies, choices, least - 1)
    assert nothing.spent == 0 and not torch.cat(nothing.choice).any()
    assert nothing.error == pytest.approx(float(torch.cat(energies).sum())) and nothing.gap == 0
    everything = solve_global(energies, choices, 10**15)
    best = [e.sum() * t.relative.min() for e, t in zip(energies, choices, strict=True)]
    assert everything.error == pytest.approx(float(sum(best))) and everything.gap == 0


def test_nothing_is_paid_for_zero_energies_or_harmful_choices():
    _, choices, budget = model(2, 50)
    found = solve_global([torch.zeros(50)] * 2, choices, budget)
    assert found.spent == 0 and found.error == found.bound == found.gap == 0
    harmful = Choices(torch.tensor([1.0, 1.2]), torch.tensor([0, 5]))
    assert solve_global([torch.ones(3)], [harmful], 100).spent == 0


def test_models_without_ranks():
    assert solve_global([], [], 5).choice == []
    found = solve_global([torch.zeros(0)], [Choices(torch.ones(1), torch.tensor([0]))], 5)
    assert found.choice[0].shape == (0,) and found.error == found.spent == 0


def test_errors_name_the_problem():
    def solve(energy=(1.0, 2.0), relative=(1.0, 0.5), cost=(0, 3), budget=5):
        table = Choices(torch.tensor(relative), torch.tensor(cost))
        return solve_global([torch.tensor(energy)], [table], budget)

    solve()
    with pytest.raises(ValueError, match="1 energies, but 0 tables"):
        solve_global([torch.ones(1)], [], 5)
    with pytest.raises(ValueError, match="budget must not be negative"):
        solve(budget=-1)
    with pytest.raises(ValueError, match="matrix 0: energies must be"):
        solve(relative=(1.0, 0.5, 0.2))
    with pytest.raises(ValueError, match="matrix 0: costs must be integers"):
        solve(cost=(0.0, 3.0))
    with pytest.raises(ValueError, match="0 for choice 0"):
        solve(cost=(1, 3))
    with pytest.raises(ValueError, match="finite"):
        solve(energy=(math.nan, 1.0))
    with pytest.raises(ValueError, match="not negative"):
        solve(relative=(1.0, -0.5))
