import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.svd import singular_values, thin_svd


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e25]),
)
def test_triplets(m, n, seed, dtype, scale):
    delta = normal(m, n, seed=seed, dtype=dtype) * scale
    left, sigma, right = thin_svd(delta)
    k = len(sigma)
    assert left.shape == (m, k) and right.shape == (k, n) and left.dtype == right.dtype == dtype
    assert k == min(m, n) and (sigma > 0).all() and (sigma.diff() <= 0).all()
    assert torch.allclose(sigma / scale, torch.linalg.svdvals(delta / scale), rtol=1e-3, atol=1e-5)
    error = torch.linalg.norm(((left * sigma) @ right - delta).double())
    assert error <= 1e-5 * torch.linalg.norm(delta.double())
    eye = torch.eye(k, dtype=dtype)
    assert torch.allclose(left.t() @ left, eye, atol=1e-3)
    assert torch.allclose(right @ right.t(), eye, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 25), (25, 60)])
def test_rank_deficient(shape):
    m, n = shape
    delta = normal(m, 7) @ normal(7, n, seed=1)
    left, sigma, right = thin_svd(delta)
    assert len(sigma) == 7
    assert torch.allclose((left * sigma) @ right, delta, atol=1e-4)


def test_truncation_keeps_the_largest():
    delta = normal(30, 20)
    whole, part = thin_svd(delta), thin_svd(delta, 5)
    assert torch.equal(whole[1][:5], part[1])
    assert torch.allclose(whole[0][:, :5], part[0]) and torch.equal(whole[2][:5], part[2])
    assert len(thin_svd(delta, 99)[1]) == 20


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 3)])
def test_zero_delta_has_no_ranks(shape):
    left, sigma, right = thin_svd(torch.zeros(shape))
    assert left.shape == (shape[0], 0) and sigma.shape == (0,) and right.shape == (0, shape[1])


def test_tall_delta_needs_no_square_of_its_height():
    delta = normal(49152, 8) * torch.logspace(0, -4, 8)
    left, sigma, right = thin_svd(delta)
    assert left.shape == (49152, 8)
    assert torch.allclose((left * sigma) @ right, delta, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite(bad):
    delta = normal(4, 4)
    delta[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        thin_svd(delta)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\[4\]"):
        thin_svd(torch.ones(4))


@pytest.mark.parametrize("shape", [(60, 25), (25, 60), (5000, 3)])
@pytest.mark.parametrize("scale", [1e-25, 1.0])
def test_singular_values_alone(shape, scale):
    delta = normal(*shape) * scale
    assert torch.allclose(singular_values(delta).float(), thin_svd(delta)[1], rtol=1e-5)
    delta = normal(shape[0], 2) @ normal(2, shape[1], seed=1)
    assert len(singular_values(delta)) == 2


def test_singular_values_of_nothing():
    assert len(singular_values(torch.zeros(3, 4))) == 0
    with pytest.raises(ValueError, match="matrix"):
        singular_values(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        singular_values(torch.full((2, 2), float("inf")))
