"""The SVD in a metric: orthonormal where it should be, and the best of its rank."""

from __future__ import annotations

import pytest
import torch

from deltamix_hf.linalg.svd import thin_svd
from deltamix_hf.linalg.whitened_svd import factorise, spectrum

M, N = 30, 22


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(dim, seed):
    rows = normal(3 * dim, dim, seed=seed) @ normal(dim, dim, seed=seed + 1)
    return rows.T @ rows / len(rows)


DELTA = normal(M, N) * torch.logspace(0, -1, N)
OUTPUTS = {"matrix": gram(M, 1), "diagonal": normal(M, seed=3).square() + 0.1, "identity": None}
INPUTS = {"matrix": gram(N, 5), "diagonal": normal(N, seed=4).square() + 0.1, "identity": None}
every_metric = pytest.mark.parametrize(
    ("outputs", "inputs"), [(a, c) for a in OUTPUTS for c in INPUTS]
)


def dense(metric, dim):
    if metric is None:
        return torch.eye(dim, dtype=torch.float64)
    return (metric.diag() if metric.dim() == 1 else metric).double()


def problem(outputs, inputs):
    """Both metrics as the package takes them and as float64 matrices."""
    a, c = OUTPUTS[outputs], INPUTS[inputs]
    return a, c, dense(a, M), dense(c, N)


def error(delta, a, c):
    return float((delta.T.double() @ a @ delta.double() @ c).trace())


def parts(factors):
    return factors.left.double(), factors.sigma.double(), factors.right.double()


@every_metric
def test_orthonormal_and_complete(outputs, inputs):
    a_given, c_given, a, c = problem(outputs, inputs)
    factors = factorise(DELTA, a_given, c_given)
    assert factors.left.dtype == factors.sigma.dtype == factors.right.dtype == torch.float32
    left, sigma, right = parts(factors)
    eye = torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(left.T @ a @ left, eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(right @ c @ right.T, eye, rtol=0, atol=1e-4)
    assert (sigma > 0).all() and (sigma.diff() <= 0).all()
    torch.testing.assert_close((left * sigma @ right).float(), DELTA, rtol=1e-3, atol=1e-4)


@every_metric
@pytest.mark.parametrize("rank", [1, 8])
def test_truncation_is_the_best_of_its_rank(outputs, inputs, rank):
    a_given, c_given, a, c = problem(outputs, inputs)
    energy = factorise(DELTA, a_given, c_given).sigma.double().square()
    left, sigma, right = parts(factorise(DELTA, a_given, c_given, rank))
    assert len(sigma) == rank
    least = error(DELTA - left * sigma @ right, a, c)
    assert least == pytest.approx(energy[rank:].sum().item(), rel=1e-4)
    for seed in range(20):
        for size in (1e-3, 1e-1):
            moved = (left + size * left.std() * normal(M, rank, seed=seed).double()) * sigma
            moved = moved @ (right + size * right.std() * normal(rank, N, seed=seed + 50).double())
            assert error(DELTA - moved, a, c) > least * (1 - 1e-9)


def test_identity_metrics_give_the_plain_svd():
    factors = factorise(DELTA, None, None)
    for found, wanted in zip(
        (factors.left, factors.sigma, factors.right), thin_svd(DELTA), strict=True
    ):
        assert torch.equal(found, wanted)
    eyes = factorise(DELTA, torch.eye(M), torch.ones(N))
    torch.testing.assert_close(eyes.sigma, factors.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        eyes.left * eyes.sigma @ eyes.right, factors.left * factors.sigma @ factors.right
    )


def test_a_metric_decides_which_rank_comes_first():
    delta = torch.diag(torch.tensor([3.0, 1.0]))
    weighed = factorise(delta, None, torch.tensor([1.0, 100.0]), rank=1)
    torch.testing.assert_close(weighed.sigma, torch.tensor([10.0]))
    torch.testing.assert_close(
        weighed.left * weighed.sigma @ weighed.right, torch.diag(torch.tensor([0.0, 1.0]))
    )


def test_delta_of_low_rank_and_none():
    low = normal(M, 3) @ normal(3, N, seed=1)
    factors = factorise(low, OUTPUTS["matrix"], INPUTS["matrix"])
    assert len(factors.sigma) == 3
    assert len(factorise(torch.zeros(M, N), None, INPUTS["matrix"]).sigma) == 0
    assert factorise(DELTA, None, None, rank=0).left.shape == (M, 0)


def test_errors():
    with pytest.raises(ValueError, match="NaN or infinity"):
        factorise(DELTA * torch.nan, None, None)
    with pytest.raises(ValueError, match="not positive definite"):
        factorise(DELTA, None, INPUTS["matrix"] - 10 * torch.eye(N))


@every_metric
def test_the_spectrum_alone(outputs, inputs):
    a, c, *_ = problem(outputs, inputs)
    found = spectrum(DELTA, a, c)
    torch.testing.assert_close(found.float(), factorise(DELTA, a, c).sigma, rtol=1e-5, atol=0)


def test_nearly_the_leading_ranks():
    m, n = 600, 520
    delta = normal(m, n) @ torch.diag(torch.arange(1, n + 1) ** -0.5)
    a, c = (torch.diag(torch.linspace(1, 2, d)) + 0.01 * torch.ones(d, d) for d in (m, n))
    least = spectrum(delta, a, c)[60:].square().sum()
    left, sigma, right = parts(factorise(delta, a, c, 60, nearly=True))
    assert error(delta - left * sigma @ right, a.double(), c.double()) < 1.03 * float(least)
    eye = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(left.T @ a.double() @ left, eye, atol=1e-4, rtol=0)
    torch.testing.assert_close(right @ c.double() @ right.T, eye, atol=1e-4, rtol=0)
