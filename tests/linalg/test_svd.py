import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.linalg import svd
from deltamix_hf.linalg.svd import LOST, leading_svd, singular_values, thin_svd


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


def low_rank(m, n, rank, seed=0):
    return normal(m, rank, seed=seed) * torch.logspace(0, -2, rank) @ normal(rank, n, seed=seed + 1)


@pytest.fixture
def no_eigenvalues(monkeypatch):
    """Only the way for deltas of low rank is open."""

    def refuse(matrix, out=None):
        raise AssertionError("the Gram matrix was used")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)


@pytest.mark.parametrize("shape", [(512, 512), (700, 520), (520, 700)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_low_rank_needs_no_gram_matrix(no_eigenvalues, shape, scale):
    """Rank 16 as LoRA's, singular values over a factor of 100."""
    delta = low_rank(*shape, 16) * scale
    left, sigma, right = thin_svd(delta)
    assert len(sigma) == 16 and left.dtype == right.dtype == torch.float32
    exact = torch.linalg.svdvals(delta.double())[:16]
    torch.testing.assert_close(sigma.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(singular_values(delta), exact, rtol=1e-5, atol=0)
    error = torch.linalg.norm(((left * sigma) @ right / scale - delta / scale).double())
    assert error <= 1e-5 * torch.linalg.norm((delta / scale).double())
    few = thin_svd(delta, 5)
    assert torch.equal(few[1], sigma[:5]) and few[0].shape[1] == 5


def test_what_is_missed_is_bounded(no_eigenvalues):
    """A tail of noise is left out as long as it holds less than LOST of the energy."""
    delta, noise = low_rank(600, 520, 16), normal(600, 520, seed=9)
    noise *= torch.linalg.norm(delta) / torch.linalg.norm(noise)
    quiet = delta + (0.9 * LOST) ** 0.5 * noise
    left, sigma, right = (part.double() for part in thin_svd(quiet))
    missed = torch.linalg.norm(quiet.double() - (left * sigma) @ right) ** 2
    assert missed <= LOST * torch.linalg.norm(quiet.double()) ** 2
    with pytest.raises(AssertionError, match="the Gram matrix was used"):
        thin_svd(delta + (2 * LOST) ** 0.5 * noise)


def test_eigenvalues_that_do_not_converge(monkeypatch):
    delta = normal(30, 20)
    expected = thin_svd(delta), singular_values(delta)

    def fail(matrix, out=None):
        if out is not None:
            out[1].fill_(torch.nan)  # it may have begun
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    left, sigma, right = thin_svd(delta)
    torch.testing.assert_close(sigma, expected[0][1])
    torch.testing.assert_close((left * sigma) @ right, delta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(singular_values(delta), expected[1])


def missed(delta, factors):
    left, sigma, right = (part.double() for part in factors)
    return float(torch.linalg.norm(delta.double() - (left * sigma) @ right) ** 2)


@pytest.mark.parametrize("shape", [(700, 520), (520, 700), (512, 512)])
@pytest.mark.parametrize("fall", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_leading_ranks_miss_hardly_more_than_the_best(shape, fall, scale):
    delta = normal(*shape) * (torch.arange(1, shape[1] + 1) ** -fall) * scale
    best = missed(delta / scale, thin_svd(delta / scale, 90))
    found = leading_svd(delta, 90)
    assert [tuple(p.shape) for p in found] == [(shape[0], 90), (90,), (90, shape[1])]
    left, sigma, right = found
    small = 1e-6 * float((delta / scale).square().sum())  # rounding to 8 bits loses 35 times that
    assert missed(delta / scale, (left, sigma / scale, right)) < 1.04 * best + small
    eye = torch.eye(90)
    torch.testing.assert_close(left.T @ left, eye, atol=1e-4, rtol=0)
    torch.testing.assert_close(right @ right.T, eye, atol=1e-4, rtol=0)


def test_leading_ranks_of_what_has_few_or_none():
    low = low_rank(600, 520, 40)
    assert len(leading_svd(low, 100)[1]) == len(leading_svd(low.T, 100)[1]) == 40
    assert len(leading_svd(torch.zeros(600, 520), 100)[1]) == 0
    assert len(leading_svd(normal(600, 520), 0)[1]) == 0
    with pytest.raises(ValueError, match="NaN or infinity"):
        leading_svd(torch.full((600, 520), torch.nan), 50)
    with pytest.raises(ValueError, match="matrix"):
        leading_svd(torch.ones(4), 2)


def test_where_leading_ranks_are_not_found_all_are(monkeypatch):
    """Too many of them, a small matrix, or no convergence."""
    for delta, rank in ((normal(600, 520), 300), (normal(100, 90), 5)):
        for found, wanted in zip(leading_svd(delta, rank), thin_svd(delta, rank), strict=True):
            assert torch.equal(found, wanted)
    monkeypatch.setattr(svd, "_STEPS", 1)
    delta = normal(600, 520)
    assert torch.equal(leading_svd(delta, 50)[1], thin_svd(delta, 50)[1])
