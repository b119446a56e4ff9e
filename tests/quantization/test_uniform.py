import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.quantization import uniform
from deltamix_hf.quantization.uniform import MIN_MAX


def spread(k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator) * torch.logspace(-6, 3, k)[:, None]


def rounded(x, bits, group_size):
    """Codes, scales and zero points of the rows of x."""
    scales, zeros = MIN_MAX.fit(x, bits, group_size)
    return MIN_MAX.encode(x, scales, zeros, bits, group_size), scales, zeros


def dequantize(codes, scales, zeros, group_size):
    """Values of the codes, whose width a grid with zero points need not know."""
    return MIN_MAX.decode(codes, scales, zeros, torch.full((len(codes),), 8), group_size)


@given(
    bits=st.integers(1, 8),
    n=st.integers(1, 40),
    group_size=st.sampled_from([0, 1, 7, 16, 64]),
    seed=st.integers(0, 999),
)
def test_error_is_at_most_half_a_step_inside_the_range(bits, n, group_size, seed):
    x, widths = spread(5, n, seed), torch.full((5,), bits)
    codes, scales, zeros = rounded(x, widths, group_size)
    groups = uniform.group_count(n, group_size)
    assert scales.shape == zeros.shape == (5, groups)
    assert int(codes.max()) < 1 << bits and int(zeros.max()) < 1 << bits
    values = dequantize(codes, scales, zeros, group_size)
    member = torch.arange(n) // (group_size or n)
    step, zero = scales[:, member], zeros[:, member].float()
    inside = (x >= -zero * step) & (x <= ((1 << bits) - 1 - zero) * step)
    assert ((values - x).abs() <= step * 0.50001)[inside].all()
    # Outside, the value is the nearest end of the grid.
    end = torch.where(x < 0, -zero, (1 << bits) - 1 - zero) * step
    assert torch.equal(values[~inside], end[~inside])
    assert torch.equal(scales, scales.bfloat16().float())


def test_against_the_formula():
    x = torch.tensor([[-1.0, 0.5, 2.0, 0.1]])
    codes, scale, zero = rounded(x, torch.tensor([2]), 0)
    assert scale.item() == 1.0 and zero.item() == 1
    assert codes.tolist() == [[0, 1, 3, 1]]
    scale, zero = MIN_MAX.fit(torch.tensor([[0.3, 0.9]]), torch.tensor([4]), 0)
    assert scale.item() == torch.tensor(0.9 / 15).bfloat16().item() and zero.item() == 0


def test_zero_bits_and_zero_groups_decode_to_zero():
    x = spread(3, 20, 0)
    x[1] = 0
    codes, scales, zeros = rounded(x, torch.tensor([0, 3, 8]), 8)
    values = dequantize(codes, scales, zeros, 8)
    assert values[:2].eq(0).all() and values[2].ne(0).all()
    assert codes[:2].eq(0).all() and scales[:2].eq(1).all()


def test_last_group_may_be_shorter():
    x, widths = spread(4, 21, 1), torch.tensor([2, 3, 4, 8])
    codes, scales, zeros = rounded(x, widths, 8)
    whole = dequantize(codes, scales, zeros, 8)
    for group, part in enumerate(x.split(8, dim=1)):
        alone = rounded(part, widths, 0)
        assert torch.equal(alone[1][:, 0], scales[:, group])
        assert torch.equal(whole.split(8, dim=1)[group], dequantize(*alone, 0))


def test_scale_bit_patterns():
    scales = MIN_MAX.fit(spread(6, 9, 2), torch.tensor([1, 2, 3, 4, 6, 8]), 0)[0]
    bits = uniform.scales_to_bits(scales)
    assert bits.dtype == torch.int16
    assert torch.equal(uniform.scales_from_bits(bits), scales)
    with pytest.raises(ValueError, match="int16"):
        uniform.scales_from_bits(bits.int())


def test_errors_name_the_problem():
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[2, 3\], got \[2, 2\]"):
        dequantize(codes, torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"0\.\.8"):
        MIN_MAX.fit(torch.ones(1, 2), torch.tensor([9]), 0)
    with pytest.raises(ValueError, match="group_size"):
        uniform.group_count(4, -1)
