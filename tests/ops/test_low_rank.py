"""The custom ops against dense float64, their gradients, and torch's own checks of custom ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import TOLERANCES, arguments, relative
from packed_cases import each_codebook, pack

from deltamix_hf.ops.low_rank import low_rank, low_rank_rows

LAYOUTS = [  # m, n, v_bits, u_bits, group_size
    (64, 96, [8, 8, 3, 3, 2, 2, 2], [8, 8, 3, 3, 2, 2, 2], 32),
    (33, 65, [4, 3, 1], [2, 3, 5], 0),
    (130, 257, [6, 5, 2], [7, 5, 2], 128),
    (1, 1, [8], [8], 0),
    (19, 43, [8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8], 16),
]


@each_codebook
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_low_rank_against_float64(layout, transposed, dtype, gaussian):
    packed, delta = pack(*layout, gaussian=gaussian)
    x = torch.randn(3, 5, delta.shape[0 if transposed else 1]).to(dtype)
    expected = x.double() @ (delta if transposed else delta.T)
    found = low_rank(x, *arguments(packed, transposed))
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative(found, expected) < TOLERANCES[dtype]


@given(
    widths=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=9),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    group_size=st.sampled_from([0, 1, 7, 32, (0, 16)]),
    gaussian=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_any_factors_against_float64(widths, m, n, group_size, gaussian, seed):
    """Both directions, the gradient and the rows of the same delta, dropped ranks among them."""
    v_bits, u_bits = ([pair[i] for pair in widths] for i in (0, 1))
    packed, delta = pack(m, n, v_bits, u_bits, group_size, seed, gaussian)
    random = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(3, size, generator=random, dtype=torch.float64) for size in (n, m))
    x.requires_grad_()
    y = low_rank(x, *arguments(packed, False))
    y.backward(g)
    scale = float(delta.abs().sum()) + 1e-30
    close = {"rtol": 1e-12, "atol": 1e-13 * scale}
    torch.testing.assert_close(y, x @ delta.T, **close)
    torch.testing.assert_close(x.grad, g @ delta, **close)
    torch.testing.assert_close(low_rank(g, *arguments(packed, True)), g @ delta, **close)
    index = torch.randint(0, m, (5,), generator=random)
    rows = low_rank_rows(index, *arguments(packed)).double()
    torch.testing.assert_close(rows, delta[index], rtol=1e-5, atol=1e-6 * scale)


@each_codebook
@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (2, 3, 4, 96)])
def test_low_rank_keeps_leading_dimensions(shape, gaussian):
    packed, delta = pack(*LAYOUTS[0], gaussian=gaussian)
    x = torch.randn(shape)
    expected = x.double() @ delta.T
    torch.testing.assert_close(
        low_rank(x, *arguments(packed, False)).double(), expected, rtol=1e-4, atol=1e-4
    )


@each_codebook
def test_low_rank_takes_any_strides(gaussian):
    packed, delta = pack(*LAYOUTS[0], gaussian=gaussian)
    for x in (torch.randn(96, 5).T, torch.randn(4, 1, 96).expand(4, 3, 96), torch.randn(5, 192)):
        x = x[..., ::2] if x.shape[-1] == 192 else x
        expected = x.double() @ delta.T
        assert relative(low_rank(x, *arguments(packed, False)), expected) < 1e-6


@each_codebook
def test_autocast_does_not_change_the_dtype_the_compiler_was_told(gaussian):
    """Else code compiled under autocast would read the result as another dtype."""
    packed, delta = pack(*LAYOUTS[0], gaussian=gaussian)
    with torch.autocast("cpu", torch.bfloat16):
        rows = low_rank_rows(torch.arange(packed.m), *arguments(packed))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, packed.n, dtype=dtype)
            assert low_rank(x, *arguments(packed, False)).dtype == dtype
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), delta, rtol=1e-5, atol=1e-5)


@each_codebook
def test_no_ranks_is_zero(gaussian):
    packed, _ = pack(5, 7, [], [], 32, gaussian=gaussian)
    assert torch.equal(low_rank(torch.randn(2, 7), *arguments(packed, False)), torch.zeros(2, 5))
    rows = low_rank_rows(torch.tensor([0, 4]), *arguments(packed))
    assert torch.equal(rows, torch.zeros(2, 7))


@each_codebook
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_equal_the_dense_rows(layout, gaussian):
    packed, delta = pack(*layout, gaussian=gaussian)
    index = torch.randint(0, packed.m, (4, 3))
    index[0, 0], index[0, 1] = 0, packed.m - 1
    found = low_rank_rows(index, *arguments(packed))
    assert found.shape == (4, 3, packed.n) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), delta[index], rtol=1e-5, atol=1e-5)
    every = low_rank_rows(torch.arange(packed.m), *arguments(packed))
    assert torch.equal(found, every[index])  # to the bit, however many are looked up
    assert torch.equal(low_rank_rows(index[0, 1], *arguments(packed)), found[0, 1])
    torch.testing.assert_close(every.double(), delta, rtol=1e-5, atol=1e-5)


@each_codebook
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_rows_of_empty_and_scalar_index(shape, gaussian):
    packed, delta = pack(*LAYOUTS[1], gaussian=gaussian)
    index = torch.full(shape, 7)
    found = low_rank_rows(index, *arguments(packed)).double()
    torch.testing.assert_close(found, delta[index], rtol=1e-5, atol=1e-5)


@each_codebook
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient_is_that_of_the_dense_delta(layout, gaussian):
    packed, delta = pack(*layout, gaussian=gaussian)
    x = torch.randn(6, packed.n, requires_grad=True)
    weights = torch.randn(6, packed.m)
    (low_rank(x, *arguments(packed, False)).sin() * weights).sum().backward()
    dense = x.detach().double().requires_grad_()
    ((dense @ delta.T).sin() * weights).sum().backward()
    assert relative(x.grad, dense.grad) < 1e-5


@each_codebook
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed, gaussian):
    packed, _ = pack(9, 6, [8, 3, 2], [8, 3, 2], 4, gaussian=gaussian)
    x = torch.randn(2, 9 if transposed else 6, dtype=torch.float64, requires_grad=True)

    def op(x):
        return low_rank(x, *arguments(packed, transposed))

    torch.autograd.gradcheck(op, x)
    torch.autograd.gradgradcheck(op, x)


@each_codebook
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_low_rank(transposed, gaussian):
    packed, _ = pack(*LAYOUTS[1], gaussian=gaussian)
    width = packed.m if transposed else packed.n
    for x in (
        torch.randn(2, 3, width, requires_grad=True),
        torch.randn(width, 4, dtype=torch.bfloat16).T,
        torch.randn(4, 1, width).expand(4, 3, width),
    ):
        torch.library.opcheck(low_rank, (x, *arguments(packed, transposed)))


@each_codebook
def test_opcheck_low_rank_rows(gaussian):
    packed, _ = pack(*LAYOUTS[1], gaussian=gaussian)
    for index in (torch.tensor([[0, 32, 5], [1, 1, 2]]), torch.tensor(3), torch.arange(9)[::2]):
        torch.library.opcheck(low_rank_rows, (index, *arguments(packed)))
