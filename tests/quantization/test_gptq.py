"""GPTQ against a float64 implementation of the equations of the paper, without its speed-ups."""

from functools import partial

import pytest
import torch
from packed_cases import quantizer

from deltamix_hf.linalg.second_moments import damped
from deltamix_hf.quantization import gaussian as codebook
from deltamix_hf.quantization.gaussian import GAUSSIAN
from deltamix_hf.quantization.gptq import Rounded, gptq_columns, gptq_rows, round_rows
from deltamix_hf.quantization.uniform import MIN_MAX


def gram(n, seed=0, samples=None):
    """A damped Gram of correlated inputs whose features differ by two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5
    x = torch.randn(samples or 4 * n, n, generator=generator) @ mix * torch.logspace(0, -1, n)
    return x.t() @ x / len(x)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(values, scale, zero, bits):
    if bits == 0:
        return torch.zeros_like(values)
    code = (torch.round(values / scale) + zero).clamp(0, 2**bits - 1)
    return (code - zero) * scale


def slow_range(values, bits):
    """Grid of one group, from its definition."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    scale = torch.tensor((high - low) / max(2**bits - 1, 1)).bfloat16().item()
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def obq(columns, hessian, order, quant):
    """Equation 2 of the paper for the columns `[s][l]` in `order`: quantize one column, correct
    the others with the inverse Hessian of the remaining ones (equation 3)."""
    values = columns.double().clone()
    inverse = torch.linalg.inv(hessian.double())
    result = torch.zeros_like(values)
    for i in order:
        result[i] = quant(i, values[i])
        error = (values[i] - result[i]) / inverse[i, i]
        values -= inverse[:, i, None] * error
        inverse -= inverse[:, i, None] * inverse[i] / inverse[i, i]
        inverse[i, i] = 1.0  # out of play
    return result


def slow_rows(weight, hessian, bits, group_size):
    width = group_size or weight.shape[1]
    grids = [
        [slow_range(part, b) for part in row.split(width)]
        for row, b in zip(weight, bits.tolist(), strict=True)
    ]

    def quant(i, values):
        per_row = zip(values, grids, bits.tolist(), strict=True)
        return torch.stack([step(v, *g[i // width], b) for v, g, b in per_row])

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    return obq(weight.t(), hessian, order, quant).t()


def slow_gaussian_rows(weight, hessian, bits, group_size):
    """Scales are codebook's own (`test_codebook`); levels are found by comparing with all."""
    width = group_size or weight.shape[1]
    scales = GAUSSIAN.fit(weight, bits, group_size, hessian.diagonal())[0].double()
    levels = [codebook.levels(b).double() for b in bits.tolist()]

    def quant(i, values):
        found = []
        for value, table, scale in zip(values, levels, scales[:, i // width], strict=True):
            grid_points = table * scale
            found.append(grid_points[(grid_points - value).abs().argmin()])
        return torch.stack(found)

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    return obq(weight.t(), hessian, order, quant).t()


def slow_columns(weight, hessian, bits, group_size):
    def quant(i, values):
        b = int(bits[i])
        parts = values.split(group_size or len(values))
        return torch.cat([step(part, *slow_range(part, b), b) for part in parts])

    return obq(weight.t(), hessian, range(weight.shape[1]), quant)


def cost(delta, hessian):
    delta = delta.double()
    return ((delta @ hessian.double()) * delta).sum().item()


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
@pytest.mark.parametrize("group_size", [0, 8, 32, 200])
def test_rows_match_the_textbook(group_size, gaussian):
    weight, hessian = normal(6, 150), damped(gram(150), 0.01)
    bits = torch.tensor([1, 2, 3, 4, 8, 0])
    fast = gptq_rows(weight, hessian, bits, group_size, quantizer(gaussian)).dequantize()
    slow = (slow_gaussian_rows if gaussian else slow_rows)(weight, hessian, bits, group_size)
    # A value on a rounding edge may fall either way in float32, and then the rest of its row.
    assert (fast.double() - slow).abs().lt(1e-4).double().mean() > 0.97
    for i in range(6):
        assert cost(fast[i] - weight[i], hessian) == pytest.approx(
            cost(slow[i] - weight[i], hessian), rel=0.02
        )


@pytest.mark.parametrize("group_size", [0, 16, 33])
def test_columns_match_the_textbook(group_size):
    weight = normal(70, 100, seed=3) * torch.logspace(1, -2, 100)
    hessian = damped(gram(100, seed=1), 0.01).double() + torch.diag(
        torch.logspace(-4, 2, 100).double()
    )
    bits = torch.tensor([8, 4, 3, 2, 0] * 20)
    fast = gptq_columns(weight, hessian, bits, group_size).dequantize()
    slow = slow_columns(weight, hessian, bits, group_size)
    assert fast.shape == (100, 70)
    close = (fast.double() - slow).abs() < 1e-3 * weight.t().abs().amax(1, keepdim=True)
    assert close.double().mean() > 0.97
    assert cost(fast.t() - weight, hessian) == pytest.approx(
        cost(slow.t() - weight, hessian), rel=0.02
    )


def test_better_than_rounding_to_nearest():
    ratios = []
    for seed in range(5):
        weight, bits = normal(40, 96, seed=seed), torch.tensor([2, 3, 4, 8] * 10)
        hessian = damped(gram(96, seed), 0.01)
        near, plain = gptq_rows(weight, hessian, bits, 32), gptq_rows(weight, None, bits, 32)
        ratios.append(
            cost(near.dequantize() - weight, hessian) / cost(plain.dequantize() - weight, hessian)
        )
        factor, hessian = weight.t(), damped(gram(40, seed), 0.01)
        near, plain = gptq_columns(factor, hessian, bits, 32), round_rows(factor.t(), bits, 32)
        ratios.append(
            cost(near.dequantize().t() - factor, hessian)
            / cost(plain.dequantize().t() - factor, hessian)
        )
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_rows_beat_rounding_to_nearest(bits, group_size):
    """In the Hessian, at every width; plain rounding is better without it."""
    ratios = []
    for seed in range(3):
        weight, hessian = normal(24, 96, seed=seed), damped(gram(96, seed), 0.01)
        widths = torch.full((24,), bits)
        swept, plain = (
            gptq_rows(weight, h, widths, group_size, quantizer=GAUSSIAN) for h in (hessian, None)
        )
        for rounded in (swept, plain):
            assert rounded.zeros is None and rounded.codes.dtype == torch.uint8
            assert int(rounded.codes.max()) < 1 << bits and torch.equal(rounded.bits, widths)
            assert torch.equal(rounded.scales, rounded.scales.bfloat16().float())
            assert torch.isfinite(rounded.dequantize()).all()
        errors = [rounded.dequantize() - weight for rounded in (swept, plain)]
        ratios.append(cost(errors[0], hessian) / cost(errors[1], hessian))
        assert errors[1].square().sum() < errors[0].square().sum()
    # the fewer levels, the sooner the errors handed on run past the last one
    assert max(ratios) < {1: 1.0, 2: 0.75}.get(bits, 0.5)


def test_gaussian_beats_min_max_on_normal_rows():
    """One scale a row and no zero points, against groups of 128 with them: fewer bytes too."""
    weight, hessian = normal(30, 256), damped(gram(256), 0.01)
    for bits in (2, 3, 4):
        widths = torch.full((30,), bits)
        near, grouped = (
            cost(gptq_rows(weight, hessian, widths, *kind).dequantize() - weight, hessian)
            for kind in ((0, GAUSSIAN), (128, MIN_MAX))
        )
        assert near < grouped


def test_gaussian_rows_of_width_zero_decode_to_zero():
    weight, bits = normal(4, 20), torch.tensor([3, 0, 2, 8])
    for hessian in (None, damped(gram(20), 0.01)):
        found = gptq_rows(weight, hessian, bits, 8, quantizer=GAUSSIAN)
        assert found.codes[1].eq(0).all() and found.dequantize()[1].eq(0).all()
        assert found.dequantize()[[0, 2, 3]].ne(0).all()  # no level is 0


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
def test_rows_picked_and_scaled(gaussian):
    weight, bits = normal(5, 40), torch.tensor([2, 3, 4, 8, 2])
    whole = round_rows(weight, bits, 16, quantizer(gaussian))
    values = whole.dequantize()
    for index in (torch.tensor([3, 0]), torch.tensor([True, False, False, True, True])):
        part = whole.rows(index)
        assert torch.equal(part.dequantize(), values[index])
        assert torch.equal(part.bits, bits[index]) and part.group_size == 16
    assert whole.rows(torch.tensor([], dtype=torch.int64)).dequantize().shape == (0, 40)
    gains = torch.tensor([1.0, 0.5, 1.3, -2.0, 0.7])
    scaled = whole.scaled(gains)
    assert torch.equal(scaled.codes, whole.codes)
    assert torch.equal(scaled.scales, scaled.scales.bfloat16().float())
    exact = values * gains[:, None]
    assert (scaled.dequantize() - exact).abs().le(exact.abs() * 2**-8).all()
    assert torch.equal(whole.dequantize(), values)  # the original is left alone


def test_identity_hessian_is_plain_rounding():
    weight, bits = normal(5, 40), torch.tensor([2, 3, 4, 8, 0])
    plain = gptq_rows(weight, None, bits, 16)
    for rounder, factor in ((gptq_rows, weight), (gptq_columns, weight.t())):
        swept = rounder(factor, torch.eye(factor.shape[1]), bits, 16)
        for name in ("codes", "scales", "zeros", "bits"):
            assert torch.equal(getattr(plain, name), getattr(swept, name)), name
    costs = normal(40).square()
    for plain, hessian in ((None, torch.eye(40)), (costs, torch.diag(costs))):
        near, swept = (gptq_rows(weight, h, bits, 16, quantizer=GAUSSIAN) for h in (plain, hessian))
        assert torch.equal(near.codes, swept.codes) and torch.equal(near.scales, swept.scales)


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
def test_dead_columns_are_rounded_on_their_own(gaussian):
    weight, bits = normal(4, 24), torch.full((4,), 4)
    hessian = gram(24)
    hessian[3], hessian[:, 3] = 0, 0
    result = gptq_rows(weight, hessian, bits, 8, quantizer(gaussian))
    plain = gptq_rows(weight, hessian.diagonal(), bits, 8, quantizer(gaussian))
    assert torch.equal(result.codes[:, 3], plain.codes[:, 3])
    hessian[3, 3] = 1e-6 * hessian.diagonal().max()  # the share at which scales are fitted to it
    alone = gptq_rows(weight, hessian, bits, 8, quantizer(gaussian))
    assert torch.equal(result.codes, alone.codes)


def test_ranks_absorb_a_dropped_rank():
    weight, hessian = normal(30, 20), damped(gram(20), 0.01)
    bits = torch.tensor([0] * 4 + [8] * 16)
    result = gptq_columns(weight, hessian, bits, 0)
    values = result.dequantize().t()
    assert values[:, :4].eq(0).all() and result.codes[:4].eq(0).all()
    dropped = weight.clone()
    dropped[:, :4] = 0
    assert cost(values - weight, hessian) < 0.7 * cost(dropped - weight, hessian)


def test_columns_are_equivariant_under_scaling():
    weight, hessian, bits = normal(16, 12), damped(gram(12), 0.01), torch.tensor([2, 3, 4] * 4)
    scale = 2.0 ** torch.arange(-30, 30, 5)
    plain = gptq_columns(weight, hessian, bits, 8)
    scaled = gptq_columns(weight * scale, hessian / scale[:, None] / scale, bits, 8)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scales * scale[:, None], scaled.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_not_changed(dtype):
    weight, hessian, bits = normal(8, 8).to(dtype), gram(8).to(dtype), torch.full((8,), 3)
    before = weight.clone(), hessian.clone()
    gaussian_rows = partial(gptq_rows, quantizer=GAUSSIAN)
    for rounder in (gptq_rows, gaussian_rows, gptq_columns):
        result = rounder(weight, hessian, bits, 4)
        assert isinstance(result, Rounded) and result.codes.is_contiguous()
        assert result.dequantize().dtype == torch.float32
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_singular_hessians_are_damped_and_indefinite_ones_refused():
    weight, bits = normal(4, 32), torch.full((4,), 3)
    singular = gram(32, samples=8)
    result = gptq_rows(weight, singular, bits, 0).dequantize()
    plain = gptq_rows(weight, None, bits, 0).dequantize()
    assert cost(result - weight, singular) < cost(plain - weight, singular)
    with pytest.raises(ValueError, match="32 x 32 Hessian is not positive definite"):
        gptq_rows(weight, 2 * torch.ones(32, 32) - torch.eye(32) * 1.9 - singular, bits, 0)


def test_damp():
    hessian = gram(6)
    added = damped(hessian, 0.1) - hessian
    assert torch.allclose(added, 0.1 * hessian.diagonal().mean() * torch.eye(6))


def test_errors_name_the_problem():
    weight, bits = normal(4, 6), torch.full((4,), 3)
    with pytest.raises(ValueError, match=r"hessian must be \[6, 6\] or \[6\], got \[4, 4\]"):
        gptq_rows(weight, torch.eye(4), bits, 0)
    with pytest.raises(ValueError, match="one width for each of 6 ranks"):
        gptq_columns(weight, torch.eye(6), bits, 0)
    with pytest.raises(ValueError, match="weight to round holds NaN"):
        gptq_rows(weight / 0 * 0, None, bits, 0)
    with pytest.raises(ValueError, match="Hessian holds NaN"):
        gptq_rows(weight, torch.full((6, 6), torch.nan), bits, 0)


def test_grid_and_rounded_agree():
    weight, bits = normal(3, 20), torch.tensor([2, 4, 8])
    result = gptq_rows(weight, damped(gram(20), 0.01), bits, 8)
    assert torch.equal(
        result.dequantize(),
        MIN_MAX.decode(result.codes, result.scales, result.zeros, bits, 8),
    )
