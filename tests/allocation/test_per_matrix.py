import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamix_hf.allocation.per_matrix import bands, solve

PUBLISHED = {0: 0, 2: 270, 3: 400, 8: 1050}


def brute_force(table, costs, budget, f_max=None):
    """Least error of all B^k choices, or None."""
    k, b = table.shape
    choices = np.array(list(itertools.product(range(b), repeat=k)))
    rows = np.arange(k)
    fits = np.broadcast_to(costs, table.shape)[rows, choices].sum(1) <= budget
    if f_max is not None:
        fits &= np.array([len(set(choice)) <= f_max for choice in choices.tolist()])
    return table[rows, choices].sum(1)[fits].min() if fits.any() else None


@st.composite
def small_tables(draw):
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    b = draw(st.integers(1, 4))
    k = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["wide", "ties", "falling", "zeros"]))
    if kind == "wide":
        table = 10.0 ** generator.uniform(-12, 0, (k, b))
    elif kind == "ties":
        table = generator.integers(0, 3, (k, b)).astype(float)
    elif kind == "falling":
        table = np.sort(generator.random((k, b)) ** 4, axis=1)[:, ::-1].copy()
    else:
        table = generator.random((k, b)) * generator.integers(0, 2, (k, b))
    shape = (k, b) if draw(st.booleans()) else (b,)
    top = draw(st.sampled_from([3, 30, 10**6]))
    costs = generator.integers(0, top, shape)
    most = int(np.broadcast_to(costs, table.shape).max(1).sum())
    budget = draw(st.integers(0, most + 1))
    return table, costs, budget, draw(st.sampled_from([None, 1, 2, 3]))


@settings(max_examples=300)
@given(small_tables())
def test_equals_brute_force_and_keeps_the_budget(case):
    table, costs, budget, f_max = case
    expected = brute_force(table, costs, budget, f_max)
    if expected is None:
        with pytest.raises(ValueError, match="pays no choice"):
            solve(torch.tensor(table), torch.tensor(costs), budget, f_max)
        return
    found = solve(torch.tensor(table), torch.tensor(costs), budget, f_max)
    choice = found.choice[0].numpy()
    rows = np.arange(len(table))
    assert np.broadcast_to(costs, table.shape)[rows, choice].sum() <= budget
    assert found.error == pytest.approx(table[rows, choice].sum(), rel=1e-12)
    assert math.isclose(found.error, expected, rel_tol=1e-9, abs_tol=1e-300)
    assert found.bound <= found.error and 0 <= found.gap <= 1e-9
    assert f_max is None or len(set(choice.tolist())) <= f_max


def synthetic(ranks, seed=0, decay=1.0):
    """Error table and bytes per width of a square matrix whose sigma falls as rank^-decay."""
    generator = np.random.default_rng(seed)
    widths = (0, 2, 3, 4, 6, 8)
    power = np.arange(1, ranks + 1.0)[:, None] ** (-2 * decay)
    factor = np.array([1.0 if b == 0 else 1.5 * 4.0**-b for b in widths])
    table = power * factor * np.exp(0.3 * generator.standard_normal((ranks, len(widths))))
    costs = [0 if b == 0 else b * ranks // 4 + 4 * -(-ranks // 128) + b for b in widths]
    return torch.tensor(table), costs


def test_larger_tables_are_solved_to_optimality():
    for ranks, decay, f_max in ((4096, 1.0, None), (4096, 0.1, None), (1024, 1.0, 3)):
        table, costs = synthetic(ranks, decay=decay)
        budget = 2 * ranks * ranks // 16
        found = solve(table, costs, budget, f_max)
        assert found.spent == sum(costs[b] for b in found.choice[0].tolist())
        assert 0.999 * budget < found.spent <= budget
        assert found.gap <= 1e-10
        assert f_max is None or len(found.choice[0].unique()) <= f_max


def test_is_deterministic_and_ignores_the_scale_of_errors():
    table, costs = synthetic(300)
    first = solve(table, costs, 10_000)
    assert torch.equal(first.choice[0], solve(table, costs, 10_000).choice[0])
    scaled = solve(table * 2.0**-60, costs, 10_000)
    assert torch.equal(first.choice[0], scaled.choice[0])
    assert scaled.error == pytest.approx(first.error * 2.0**-60, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_more_choices_than_there_are_widths(seed):
    """Pairs of widths for V and U are choices too."""
    generator = np.random.default_rng(seed)
    table, costs = generator.random((3, 14)) ** 3, generator.integers(0, 99, 14)
    budget = int(generator.uniform(0.2, 0.8) * 3 * costs.max())
    found = solve(torch.tensor(table), torch.tensor(costs), budget)
    choice = found.choice[0].numpy()
    assert costs[choice].sum() <= budget
    assert found.error == pytest.approx(table[np.arange(3), choice].sum(), rel=1e-12)
    assert found.error == pytest.approx(brute_force(table, costs, budget), rel=1e-9)


def test_a_budget_that_does_not_bind():
    table, costs = synthetic(20)
    found = solve(table, torch.tensor(costs), 10**9)
    assert found.error == pytest.approx(table.min(1).values.sum().item())
    assert found.gap == 0


def test_solve_without_ranks():
    found = solve(torch.zeros(0, 3), [0, 5, 9], 0)
    assert found.choice[0].shape == (0,) and found.error == found.gap == 0


def test_solve_errors_name_the_problem():
    table = torch.ones(3, 2)
    with pytest.raises(ValueError, match="5 bytes pays no choice; least is 6"):
        solve(table, [2, 4], 5)
    with pytest.raises(ValueError, match=r"\[k, B\]"):
        solve(table[0], [2, 4], 5)
    with pytest.raises(ValueError, match="integers"):
        solve(table, [2.0, 4.0], 9)
    with pytest.raises(ValueError, match="integers"):
        solve(table, [2, 4, 5], 9)
    with pytest.raises(ValueError, match="finite"):
        solve(table * torch.nan, [2, 4], 9)
    with pytest.raises(ValueError, match="not negative"):
        solve(-table, [2, 4], 9)
    with pytest.raises(ValueError, match="f_max"):
        solve(table, [2, 4], 9, f_max=0)


def test_published_bands():
    bits = bands(100, PUBLISHED, 2 * 1050 + 32 * 400 + 50 * 270 + 269)
    assert bits.tolist() == [8] * 2 + [3] * 32 + [2] * 50 + [0] * 16


@given(
    ranks=st.integers(0, 80),
    budget=st.integers(0, 40_000),
    step=st.integers(1, 200),
)
def test_bands_keep_the_budget_and_leave_no_affordable_rank(ranks, budget, step):
    costs = {0: 0, **{b: b * step + 7 for b in (2, 3, 8)}}
    bits = bands(ranks, costs, budget).tolist()
    spent = sum(costs[b] for b in bits)
    assert len(bits) == ranks and spent <= budget
    assert bits == sorted(bits, reverse=True)
    assert 0 not in bits or spent + costs[2] > budget
