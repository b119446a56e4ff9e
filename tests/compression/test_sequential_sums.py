"""Sums of a stage, and what they say of its targets: against float64, and shared by workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.compression.sequential_sums import RIDGE, StageSums, moved_targets, target_shift
from deltamix_hf.jobs.workers import Workers

CPU = torch.device("cpu")


def batches(n, m, dtype=torch.bfloat16):
    """Inputs and residual streams of fine-tune and compressed model."""
    random = torch.Generator().manual_seed(n + m)

    def rows(count, width):
        return torch.randn(2, count, width, generator=random).to(dtype)

    return [(rows(c, n), rows(c, n), (rows(c, m), rows(c, m)) if m else None) for c in (3, 1, 7)]


@pytest.mark.parametrize("m", [0, 13])
def test_against_float64(m):
    sums = StageSums(m, 17, bool(m), CPU)
    expected = [0, 0, 0]
    for reference, compressed, residuals in batches(17, m):
        sums.add(reference, compressed, residuals)
        x, x_f = (t.flatten(0, -2).double() for t in (compressed, reference))
        expected[0] += x.T @ x
        expected[1] += (x_f - x).T @ x
        if m:  # in the model's dtype, as it runs
            expected[2] += (residuals[0] - residuals[1]).flatten(0, -2).double().T @ x
    assert sums.count == 2 * 11 and (sums.lag is None) == (m == 0)
    for one, other in zip((sums.inputs, sums.drift, sums.lag), expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def sums_of(n, lag=None, tokens=40):
    random = torch.Generator().manual_seed(n)
    x, drift = torch.randn(2, tokens, n, generator=random)
    sums = StageSums(lag or 0, n, lag is not None, CPU)
    sums.inputs, sums.drift, sums.count = x.T @ x, 0.1 * drift.T @ x, tokens
    if lag is not None:
        sums.lag = 0.1 * torch.randn(lag, tokens, generator=random) @ x
    return sums


def matrices(heights, n):
    random = torch.Generator().manual_seed(n)
    return {f"{m}": torch.randn(m, n, generator=random).to(torch.bfloat16) for m in heights}


def changes(heights, n, lag, prior=0.0):
    sums, weights = sums_of(n, lag), matrices(heights, n)
    moved = moved_targets(weights, sums, Workers())
    return target_shift(moved, dict.fromkeys(weights, 0), sums, Workers(), prior), sums


@pytest.mark.parametrize("prior", [0.0, 2.0])
@pytest.mark.parametrize("lag", [None, 300])
def test_targets_against_float64(lag, prior):
    """The ridge grows with the inputs for each of the 40 tokens seen."""
    heights = [lag] if lag else [13, 1, 300]
    found, left = changes(heights, 17, lag, prior)
    sums = sums_of(17, lag)
    gram = sums.inputs.double() / sums.count
    ridge = (RIDGE + prior * 17 / 40) * gram.diagonal().mean() * torch.eye(17, dtype=torch.float64)
    for name, weight in matrices(heights, 17).items():
        expected = weight.double() @ sums.drift.double()
        if lag:
            expected += sums.lag.double()
        expected = expected / sums.count @ torch.linalg.inv(gram + ridge)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.inputs.double(), gram, rtol=1e-6, atol=1e-6)
    assert not hasattr(left, "drift") and not hasattr(left, "lag")


@given(
    heights=st.lists(st.integers(1, 23), min_size=1, max_size=3, unique=True),
    n=st.integers(2, 19),
    size=st.integers(2, 6),
)
def test_workers_move_every_row_once(heights, n, size):
    weights, sums = matrices(heights, n), sums_of(n)
    whole = moved_targets(weights, sums, Workers())
    shares = [moved_targets(weights, sums, Workers(rank, size)) for rank in range(size)]
    for name, expected in whole.items():
        used = sum((share[name] != 0).int() for share in shares)
        assert used.max() == 1
        total = sum(share[name] for share in shares)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
