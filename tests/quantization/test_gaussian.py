"""The Gaussian codebook: its table, rounding with it, and the scale of a group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.quantization import gaussian
from deltamix_hf.quantization.gaussian import (
    CUBIC,
    DISTORTION,
    GAUSSIAN,
    decode,
    encode,
    fit,
    levels,
)

WIDTHS = range(9)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cubic(alpha, beta, bits):
    c = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return alpha * c + beta * c**3


def gaussian_error(table):
    """E[(x - nearest level)^2] of a standard normal x, by the midpoint rule; float64 levels."""
    x = torch.linspace(-7, 7, 100_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    edges = (table[1:] + table[:-1]) / 2
    near = table[torch.bucketize(x, edges)]
    return float(((x - near).square() * density).sum() * (x[1] - x[0]))


def rounded(x, bits, group_size):
    """Codes and scales of the rows of x."""
    scales, none = GAUSSIAN.fit(x, bits, group_size)
    return GAUSSIAN.encode(x, scales, none, bits, group_size), scales


def dequantize(codes, scales, bits, group_size):
    return GAUSSIAN.decode(codes, scales, None, bits, group_size)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels(bits):
    table = levels(bits)
    assert table.dtype == torch.float32 and table.shape == (2**bits,)
    assert torch.equal(table, -table.flip(0)) and (table.diff() > 0).all()
    if bits:
        assert torch.equal(table, cubic(*CUBIC[bits - 1], bits).float())
        assert gaussian_error(table.double()) == pytest.approx(DISTORTION[bits], rel=5e-4)
    codes = torch.arange(2**bits).to(torch.uint8)
    assert torch.equal(decode(codes, torch.tensor(bits)), table)
    assert torch.equal(encode(table, torch.tensor(bits)), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_cubics_are_the_best_ones(bits):
    alpha, beta = CUBIC[bits - 1]
    best = gaussian_error(cubic(alpha, beta, bits))
    for a, b in [(1.03, 1), (0.97, 1), (1, 1.03), (1, 0.97), (1.01, 0.97), (0.99, 1.03)]:
        assert gaussian_error(cubic(alpha * a, beta * b, bits)) > best * (1 - 1e-4)


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=50), st.sampled_from(list(WIDTHS)))
def test_encode_finds_the_nearest_level(values, bits):
    x, table = torch.tensor(values), levels(bits)
    codes = encode(x, torch.tensor(bits))
    distance = (x[:, None].double() - table.double()).abs()
    found = distance.gather(1, codes.long()[:, None])[:, 0]
    # All widths share one search in float32, up to 135: edges are exact to 1e-5.
    assert codes.dtype == torch.uint8 and (found <= distance.amin(1) + 2e-5).all()


def test_every_rank_has_its_own_width():
    x, bits = normal(9, 200), torch.arange(9)
    codes = encode(x, bits[:, None])
    for b in WIDTHS:
        assert torch.equal(codes[b], encode(x[b], torch.tensor(b)))
        assert torch.equal(decode(codes, bits[:, None])[b], levels(b)[codes[b].long()])


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_loses_what_the_table_says(bits):
    x, wide = normal(200_000), torch.tensor(bits)
    lost = (x - decode(encode(x, wide), wide)).square().mean().item()
    assert lost == pytest.approx(DISTORTION[bits], rel=0.02)


@pytest.mark.untraced
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("shape", ["normal", "uniform", "heavy"])
def test_the_scale_is_nearly_the_best(bits, shape, weighted):
    x = normal(20, 300, seed=bits)
    x = {"normal": x, "uniform": x.erf(), "heavy": x * x.abs()}[shape] * 1e-3
    wide = torch.full((20,), bits)

    def error(scale):
        near = decode(encode(x / scale[:, None], wide[:, None]), wide[:, None]) * scale[:, None]
        return (costs * (x - near).square()).sum(1)

    costs = normal(300, seed=9).exp() if weighted else torch.ones(300)
    found = fit(x, wide, costs if weighted else None)
    rms = ((costs * x.square()).sum(1) / costs.sum()).sqrt()
    tried = torch.stack([error(rms * step) for step in torch.logspace(-0.5, 0.7, 150)])
    assert error(found).sum() < (1.15 if weighted else 1.1) * tried.amin(0).sum()
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("group_size", [0, 1, 7, 128])
@pytest.mark.parametrize("n", [1, 7, 130])
def test_groups_are_rounded_on_their_own(n, group_size):
    x, bits = normal(9, n) * torch.logspace(-3, 3, 9)[:, None], torch.arange(9)
    codes, scales = rounded(x, bits, group_size)
    found = dequantize(codes, scales, bits, group_size)
    parts = x.split(group_size or n, dim=1)  # the last one may be shorter
    assert codes.dtype == torch.uint8 and scales.shape == (9, len(parts))
    assert torch.equal(scales, GAUSSIAN.fit(x, bits, group_size)[0])
    for i, (part, near) in enumerate(zip(parts, found.split(group_size or n, 1), strict=True)):
        scale = fit(part, bits)
        assert torch.equal(scales[:, i], scale)
        code = encode(part / scale[:, None], bits[:, None])
        assert torch.equal(near, decode(code, bits[:, None]) * scale[:, None])


def test_a_single_value_is_met():
    x = torch.tensor([[3.25], [-1e-20], [1e20]])
    for bits in range(1, 9):
        wide = torch.full((3,), bits)
        codes, scales = rounded(x, wide, 0)
        assert torch.allclose(dequantize(codes, scales, wide, 0), x, rtol=5e-3, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_of_zeros_stays_unseen(bits):
    """No level is 0, so its scale must be next to nothing; others are not touched."""
    x = normal(1, 24)
    x[:, 8:16] = 0
    wide = torch.tensor([bits])
    codes, scales = rounded(x, wide, 8)
    assert torch.isfinite(scales).all() and (scales > 0).all()
    found = dequantize(codes, scales, wide, 8)
    assert found[:, 8:16].abs().max() < 1e-20
    again, _ = rounded(x[:, :8], wide, 8)
    assert torch.equal(codes[:, :8], again)


def test_scales_follow_the_values():
    x, bits = normal(8, 64), torch.arange(1, 9)
    scale = fit(x, bits)
    assert torch.equal(fit(x * 2.0**40, bits), scale * 2.0**40)
    assert torch.equal(fit(-x, bits), scale)


def test_wrong_scales_are_named():
    codes, bits = torch.zeros(2, 10, dtype=torch.uint8), torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"need scales \[2, 3\], got \[2, 1\]"):
        dequantize(codes, torch.ones(2, 1), bits, 4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power", [1, 5])  # normal, and heavy tails
def test_scales_are_the_best_of_those_tried(bits, weighted, power):
    """Against coding every element for every scale, and least squares on the codes."""
    random = torch.Generator().manual_seed(bits)
    x = torch.randn(7, 200, generator=random, dtype=torch.float64) ** power
    costs = torch.rand(200, generator=random) + 0.1 if weighted else torch.ones(200)
    widths = torch.full((7,), bits)
    found = fit(x.float(), widths, costs if weighted else None).double()
    rms = ((costs * x.square()).sum(1) / costs.sum()).sqrt()
    widest = torch.maximum(x.abs().amax(1) / levels(bits)[-1], rms)
    best = torch.full((7,), torch.inf, dtype=torch.float64)
    expected = best.clone()
    for step in range(16):
        tried = 0.35 * rms * (widest / (0.35 * rms)) ** (step / 15)
        level = decode(encode((x / tried[:, None]).float(), widths[:, None]), widths[:, None])
        scale = (costs * x * level).sum(1) / (costs * level.square()).sum(1)
        error = (costs * (x - scale[:, None] * level).square()).sum(1)
        better = error < best
        best, expected = torch.where(better, error, best), torch.where(better, scale, expected)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)  # in bfloat16


def test_scales_of_many_short_groups_take_little_memory(monkeypatch):
    """Places of all tried scales are kept for a few groups at a time."""
    x, widths = torch.randn(40, 16), torch.tensor([8, 2]).repeat(20)
    expected = fit(x, widths)
    monkeypatch.setattr(gaussian, "_AT_ONCE", 5000)
    assert torch.equal(fit(x, widths), expected)
