import pytest
import torch
from packed_cases import quantizer

from deltamix_hf.linalg.second_moments import damped
from deltamix_hf.linalg.svd import thin_svd
from deltamix_hf.linalg.whitened_svd import Factors
from deltamix_hf.quantization.error_table import error_table, pick
from deltamix_hf.quantization.gptq import gptq_rows
from deltamix_hf.quantization.uniform import MIN_MAX

WIDTHS = (0, 2, 3, 8)


def problem(m=50, n=40):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(m, n, generator=generator) * torch.logspace(0, -2, n)
    x = torch.randn(200, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return Factors(*thin_svd(delta)), x.t() @ x / len(x)


def slow_table(factors, gram, widths, group_size, gaussian):
    right, sigma = factors.right, factors.sigma
    table = torch.zeros(len(right), len(widths), dtype=torch.float64)
    for b, width in enumerate(widths):
        for i in range(len(right)):
            row = right[i : i + 1]
            hessian = None if gram is None else damped(gram, 0.01)
            near = gptq_rows(row, hessian, torch.tensor([width]), group_size, quantizer(gaussian))
            error = (row.double() - near.dequantize().double())[0]
            metric = torch.eye(len(error)).double() if gram is None else gram.double()
            table[i, b] = sigma[i].double() ** 2 * (error @ metric @ error)
    return table


@pytest.mark.untraced
@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_against_one_rank_and_width_at_a_time(with_gram, group_size, gaussian):
    factors, gram = problem()
    gram = gram if with_gram else None
    table, rounded = error_table(factors, gram, WIDTHS, group_size, quantizer(gaussian))
    assert table.dtype == torch.float64 and table.shape == (len(factors.right), 4)
    # A value on a rounding edge may fall either way, so entries are compared to 2 %.
    torch.testing.assert_close(
        table,
        slow_table(factors, gram, WIDTHS, group_size, gaussian),
        rtol=0.02,
        atol=0,
    )
    assert (rounded.zeros is None) == gaussian
    assert rounded.bits.tolist() == [width for width in WIDTHS for _ in factors.right]


def test_rows_sum_to_the_layer_error():
    factors, gram = problem()
    table, rounded = error_table(factors, gram, WIDTHS, 16, MIN_MAX)
    choice = torch.arange(4).repeat(len(table) // 4)
    near = pick(table, rounded, choice).dequantize()
    delta = ((factors.left * factors.sigma) @ (factors.right - near)).double()
    total = (delta @ gram.double() * delta).sum().item()
    assert table.gather(1, choice[:, None]).sum().item() == pytest.approx(total, rel=1e-4)


def test_width_zero_is_the_energy_and_more_bits_help():
    factors, gram = problem()
    table, _ = error_table(factors, gram, WIDTHS, 16, MIN_MAX)
    right = factors.right.double()
    energy = factors.sigma.double() ** 2 * (right @ gram.double() * right).sum(1)
    assert torch.allclose(table[:, 0], energy)
    assert (table.sum(0).diff() < 0).all()


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
def test_pick_returns_the_rows_a_second_run_would(gaussian):
    factors, gram = problem()
    table, rounded = error_table(factors, gram, WIDTHS, 16, quantizer(gaussian))
    choice = torch.arange(4).flip(0).repeat(len(table) // 4)
    bits = torch.tensor(WIDTHS)[choice]
    picked = pick(table, rounded, choice)
    again = gptq_rows(factors.right, damped(gram, 0.01), bits, 16, quantizer(gaussian))
    assert torch.equal(picked.codes, again.codes) and torch.equal(picked.scales, again.scales)
    assert torch.equal(picked.bits, bits) and torch.equal(picked.dequantize(), again.dequantize())
    assert picked.codes[3::4].eq(0).all()


def test_errors_name_the_problem():
    factors, gram = problem()
    table, rounded = error_table(factors, gram, (2, 3), 0, MIN_MAX)
    with pytest.raises(RuntimeError, match="index 2 is out of bounds"):
        pick(table, rounded, torch.full((len(table),), 2))
    with pytest.raises(ValueError, match=f"a choice for each of {len(table)} ranks"):
        pick(table, rounded, torch.tensor([1]))
