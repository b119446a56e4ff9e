import pytest
import torch
from packed_cases import quantizer

from deltamix_hf.linalg.second_moments import damp
from deltamix_hf.linalg.svd import thin_svd
from deltamix_hf.quantization.error_table import error_table, pick
from deltamix_hf.quantization.gptq import gptq_rows

WIDTHS = (0, 2, 3, 8)


def problem(m=50, n=40):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(m, n, generator=generator) * torch.logspace(0, -2, n)
    x = torch.randn(200, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return *thin_svd(delta), x.t() @ x / len(x)


def slow_table(right, sigma, gram, widths, group_size, gaussian):
    table = torch.zeros(len(right), len(widths), dtype=torch.float64)
    for b, width in enumerate(widths):
        for i in range(len(right)):
            row = right[i : i + 1]
            hessian = None if gram is None else damp(gram)
            near = gptq_rows(row, hessian, torch.tensor([width]), group_size, quantizer(gaussian))
            error = (row.double() - near.dequantize().double())[0]
            metric = torch.eye(len(error)).double() if gram is None else gram.double()
            table[i, b] = sigma[i].double() ** 2 * (error @ metric @ error)
    return table


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_against_one_rank_and_width_at_a_time(with_gram, group_size, gaussian):
    _, sigma, right, gram = problem()
    gram = gram if with_gram else None
    table, candidates = error_table(right, sigma, gram, WIDTHS, group_size, quantizer(gaussian))
    assert table.dtype == torch.float64 and table.shape == (len(right), 4)
    # A value on a rounding edge may fall either way, so entries are compared to 2 %.
    torch.testing.assert_close(
        table,
        slow_table(right, sigma, gram, WIDTHS, group_size, gaussian),
        rtol=0.02,
        atol=0,
    )
    assert (candidates.rounded.zeros is None) == gaussian
    assert candidates.widths == WIDTHS


def test_rows_sum_to_the_layer_error():
    left, sigma, right, gram = problem()
    table, candidates = error_table(right, sigma, gram, WIDTHS, 16)
    bits = torch.tensor(WIDTHS * (len(right) // 4))
    near = pick(candidates, bits).dequantize()
    position = torch.tensor([WIDTHS.index(b) for b in bits.tolist()])
    delta = ((left * sigma) @ (right - near)).double()
    total = (delta @ gram.double() * delta).sum().item()
    assert table.gather(1, position[:, None]).sum().item() == pytest.approx(total, rel=1e-4)


def test_width_zero_is_the_energy_and_more_bits_help():
    _, sigma, right, gram = problem()
    table, _ = error_table(right, sigma, gram, WIDTHS, 16)
    energy = sigma.double() ** 2 * (right.double() @ gram.double() * right.double()).sum(1)
    assert torch.allclose(table[:, 0], energy)
    assert (table.sum(0).diff() < 0).all()


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
def test_pick_returns_the_rows_a_second_run_would(gaussian):
    _, sigma, right, gram = problem()
    _, candidates = error_table(right, sigma, gram, WIDTHS, 16, quantizer(gaussian))
    bits = torch.tensor([8, 3, 2, 0] * (len(right) // 4))
    picked = pick(candidates, bits)
    again = gptq_rows(right, damp(gram), bits, 16, quantizer(gaussian))
    assert torch.equal(picked.codes, again.codes) and torch.equal(picked.scales, again.scales)
    assert torch.equal(picked.bits, bits) and torch.equal(picked.dequantize(), again.dequantize())
    assert picked.codes[3::4].eq(0).all()


def test_errors_name_the_problem():
    _, sigma, right, gram = problem()
    with pytest.raises(ValueError, match="distinct"):
        error_table(right, sigma, gram, (2, 2), 0)
    with pytest.raises(ValueError, match="does not match right"):
        error_table(right, sigma[:3], gram, WIDTHS, 0)
    _, candidates = error_table(right, sigma, gram, (2, 3), 0)
    with pytest.raises(ValueError, match=r"\[8\] are not among the candidates \(2, 3\)"):
        pick(candidates, torch.full((len(right),), 8))
    with pytest.raises(ValueError, match=f"need {len(right)} widths"):
        pick(candidates, torch.tensor([2]))
