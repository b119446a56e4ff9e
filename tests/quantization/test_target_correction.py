from dataclasses import replace

import pytest
import torch

from deltamix_hf.linalg.svd import thin_svd
from deltamix_hf.linalg.whitened_svd import Factors, factorise
from deltamix_hf.quantization.target_correction import (
    PLAIN_DAMPING,
    corrected_left_factor,
    metric_error,
    plain_left_factor,
    unbiased_gains,
)


def problem(m=20, n=14, k=6, samples=60, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(m, n, generator=generator, dtype=dtype)
    x = torch.randn(n, samples, generator=generator, dtype=dtype)
    x *= torch.logspace(0, -1, n, dtype=dtype)[:, None]
    left, sigma, right = thin_svd(delta, k)
    noise = torch.randn(k, n, generator=generator, dtype=dtype)
    return delta, x, x @ x.t() / samples, left, sigma, right + 0.1 * noise


def damping_of(right, gram, sigma, damping):
    image = sigma[:, None] * right
    return damping * (image @ gram @ image.t()).diagonal().mean()


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_against_least_squares(damping):
    delta, x, gram, _, sigma, right = problem()
    target, hessian = corrected_left_factor(delta, gram, right, sigma, damping)
    # min |U S V X - D X|^2 / N + lambda |U|^2, as one least-squares system for U^T.
    ridge = damping_of(right, gram, sigma, damping)
    inputs = (sigma[:, None] * right @ x).t() / x.shape[1] ** 0.5
    system = torch.cat([inputs, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])
    goal = torch.cat([(delta @ x).t() / x.shape[1] ** 0.5, torch.zeros(6, 20).double()])
    expected = torch.linalg.lstsq(system, goal).solution.t() * sigma
    assert torch.allclose(target, expected, rtol=1e-8, atol=1e-10)
    expected = right @ gram @ right.t() + ridge * torch.diag(sigma**-2)
    assert torch.allclose(hessian, expected, rtol=1e-10)


def test_published_formula_in_float32():
    delta, _, gram, _, sigma, right = problem()
    image = sigma[:, None] * right
    inner = image @ gram @ image.t()
    inner += 0.01 * inner.diagonal().mean() * torch.eye(6)
    expected = delta @ gram @ image.t() @ torch.linalg.inv(inner) * sigma
    single = [t.float() for t in (delta, gram, right, sigma)]
    target, hessian = corrected_left_factor(*single, damping=0.01)
    assert target.dtype == torch.float32 and hessian.dtype == torch.float64
    assert torch.allclose(target.double(), expected, rtol=1e-3, atol=1e-4)


def test_correction_beats_the_plain_factor_and_uses_dropped_ranks():
    delta, _, gram, left, sigma, right = problem()
    plain, inner = plain_left_factor(left, gram, right, sigma)
    target, hessian = corrected_left_factor(delta, gram, right, sigma, PLAIN_DAMPING)
    kept, _ = corrected_left_factor((left * sigma) @ thin_svd(delta, 6)[2], gram, right, sigma)
    assert torch.equal(plain, left * sigma) and torch.equal(inner, hessian)
    errors = [metric_error(delta, factor, right, gram) for factor in (target, kept, plain)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dropped_rank(damping):
    delta, _, gram, _, sigma, right = problem()
    right[2] = 0
    target, _ = corrected_left_factor(delta, gram, right, sigma, damping)
    assert target[:, 2].eq(0).all()
    others = [0, 1, 3, 4, 5]
    alone, _ = corrected_left_factor(delta, gram, right[others], sigma[others], damping * 5 / 6)
    assert torch.allclose(target[:, others], alone)


def test_no_gram_is_the_identity():
    delta, _, _, left, sigma, right = problem()
    eye = torch.eye(14, dtype=torch.float64)
    for first, second in (
        (
            corrected_left_factor(delta, None, right, sigma),
            corrected_left_factor(delta, eye, right, sigma),
        ),
        (plain_left_factor(left, None, right, sigma), plain_left_factor(left, eye, right, sigma)),
    ):
        assert all(torch.allclose(a, b) for a, b in zip(first, second, strict=True))
    approx, one = delta * 0.9, torch.eye(delta.shape[1]).to(delta)
    assert metric_error(delta, approx, one, None) == pytest.approx(
        metric_error(delta, approx, one, eye)
    )


def test_no_ranks():
    delta, _, gram, left, sigma, right = problem()
    target, hessian = corrected_left_factor(delta, gram, right[:0], sigma[:0])
    assert target.shape == (20, 0) and hessian.shape == (0, 0)
    assert plain_left_factor(left[:, :0], gram, right[:0], sigma[:0])[0].shape == (20, 0)


def test_metric_error():
    delta, x, gram, _, _, _ = problem(m=5000)
    approx, one = delta + 0.1 * delta.flip(0), torch.eye(delta.shape[1]).to(delta)
    expected = ((delta - approx) @ x).square().sum() / (delta @ x).square().sum()
    assert metric_error(delta, approx, one, gram) == pytest.approx(expected.item())
    zero = torch.zeros_like(delta)
    assert metric_error(delta, zero, one, gram) == pytest.approx(1)
    assert metric_error(delta, zero[:, :0], one[:0], gram) == pytest.approx(1)
    assert metric_error(zero, zero, one, gram) == 0
    assert metric_error(zero, delta, one, gram) == float("inf")


def gain_problem(k=6):
    """Exact and rounded factors of a delta, and metrics of both sides; float32."""
    delta, _, gram, left, sigma, right = (t.float() for t in problem(k=k))
    noise = torch.Generator().manual_seed(1)
    left = left * sigma
    exact = Factors(left, torch.ones(k), thin_svd(delta, k)[2])
    down_project = torch.linspace(0.6, 0.9, k)  # as rounding to few levels shrinks
    left_hat = left * down_project + 0.05 * torch.randn(left.shape, generator=noise)
    x = torch.randn(50, len(left), generator=noise)
    return exact, left_hat, right, x.T @ x / 50, gram


@pytest.mark.parametrize("kind", ["identity", "diagonal", "full"])
def test_unbiased_gains_make_every_component_whole(kind):
    """What the rounded factors carry of an exact component, in the metric, is all of it."""
    exact, left_hat, right_hat, outputs, inputs = gain_problem()
    if kind == "identity":
        outputs = inputs = None
    elif kind == "diagonal":
        outputs, inputs = outputs.diagonal(), inputs.diagonal()
    gains = unbiased_gains(exact, left_hat, right_hat, outputs, inputs)
    assert gains.shape == (6,) and gains.dtype == torch.float32
    assert gains.min() > 0.5 and gains.max() < 3 and gains.mean() > 1.05
    found = (left_hat * gains) @ right_hat
    a, c = (
        torch.eye(d) if metric is None else metric.diag() if metric.dim() == 1 else metric
        for metric, d in ((outputs, 20), (inputs, 14))
    )
    for i in range(6):
        component = torch.outer(exact.left[:, i], exact.right[i])
        weighted = (a @ component @ c).double()
        assert (weighted * found).sum() == pytest.approx(
            (weighted * component).sum().item(), rel=1e-3
        )


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_unbiased_gains_do_not_depend_on_the_size_of_the_delta(scale):
    exact, left_hat, *others = gain_problem()
    plain = unbiased_gains(exact, left_hat, *others)
    larger = replace(exact, sigma=exact.sigma * scale)
    scaled = unbiased_gains(larger, left_hat * scale, *others)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=0)


def test_gains_of_exact_factors_are_one():
    *_, outputs, inputs = gain_problem()
    delta = problem()[0].float()
    for metrics in ((None, None), (outputs, inputs), (outputs.diagonal(), None)):
        found = factorise(delta, *metrics, 6)
        gains = unbiased_gains(found, found.left * found.sigma, found.right, *metrics)
        torch.testing.assert_close(gains, torch.ones(6), rtol=1e-3, atol=0)


def test_gains_are_clamped_and_fall_back_to_one():
    exact, left_hat, right_hat, outputs, inputs = gain_problem()
    for factor, bound in ((0.01, 3.0), (100.0, 0.5)):
        gains = unbiased_gains(exact, left_hat * factor, right_hat, outputs, inputs)
        assert gains.eq(bound).all()
    lost = unbiased_gains(exact, left_hat * 0, right_hat, outputs, inputs)
    assert torch.equal(lost, torch.ones(6))


def test_errors_name_the_problem():
    delta, _, gram, _, sigma, right = problem()
    with pytest.raises(ValueError, match="does not match right"):
        corrected_left_factor(delta[:, :5], gram, right, sigma)
    with pytest.raises(ValueError, match="does not match right"):
        corrected_left_factor(delta, gram, right, sigma[:3])
    with pytest.raises(ValueError, match="positive"):
        corrected_left_factor(delta, gram, right, sigma * 0)
    with pytest.raises(ValueError, match="differ"):
        metric_error(delta, delta[:3], torch.eye(delta.shape[1]).to(delta), gram)
