"""The custom ops against dense float64, their gradients, and torch's own checks of custom ops."""

from __future__ import annotations

import pytest
import torch
from test_packed import pack

from deltamix_hf.ops import low_rank, low_rank_rows

# Relative RMS error of (x·V̂ᵀ)·Ûᵀ against float64: the two factors and the product in between are
# each rounded to the dtype (eps/√3 RMS or so per rounding), three roundings in a row.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LAYOUTS = [  # m, n, v_bits, u_bits, group_size
    (64, 96, [8, 8, 3, 3, 2, 2, 2], [8, 8, 3, 3, 2, 2, 2], 32),
    (33, 65, [4, 3, 1], [2, 3, 5], 0),
    (130, 257, [6, 5, 2], [7, 5, 2], 128),
    (1, 1, [8], [8], 0),
]


def arguments(packed, transposed=None):
    flat = [number for run in packed.runs for number in run]
    tail = () if transposed is None else (transposed,)
    return *packed.tensors.values(), flat, packed.m, packed.n, packed.group_size, *tail


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_low_rank_against_float64(layout, transposed, dtype):
    packed, delta = pack(*layout)
    x = torch.randn(3, 5, delta.shape[0 if transposed else 1]).to(dtype)
    expected = x.double() @ (delta if transposed else delta.T)
    found = low_rank(x, *arguments(packed, transposed))
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (2, 3, 4, 96)])
def test_low_rank_keeps_leading_dimensions(shape):
    packed, delta = pack(*LAYOUTS[0])
    x = torch.randn(shape)
    expected = x.double() @ delta.T
    torch.testing.assert_close(
        low_rank(x, *arguments(packed, False)).double(), expected, rtol=1e-4, atol=1e-4
    )


def test_low_rank_takes_any_strides():
    packed, delta = pack(*LAYOUTS[0])
    for x in (torch.randn(96, 5).T, torch.randn(4, 1, 96).expand(4, 3, 96), torch.randn(5, 192)):
        x = x[..., ::2] if x.shape[-1] == 192 else x
        expected = x.double() @ delta.T
        assert relative(low_rank(x, *arguments(packed, False)), expected) < 1e-6


def test_autocast_does_not_change_the_dtype_the_compiler_was_told():
    """Else code compiled under autocast would read the result as another dtype."""
    packed, delta = pack(*LAYOUTS[0])
    with torch.autocast("cpu", torch.bfloat16):
        rows = low_rank_rows(torch.arange(packed.m), *arguments(packed))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, packed.n, dtype=dtype)
            assert low_rank(x, *arguments(packed, False)).dtype == dtype
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), delta, rtol=1e-5, atol=1e-5)


def test_no_ranks_is_zero():
    packed, _ = pack(5, 7, [], [], 32)
    assert torch.equal(low_rank(torch.randn(2, 7), *arguments(packed, False)), torch.zeros(2, 5))
    rows = low_rank_rows(torch.tensor([0, 4]), *arguments(packed))
    assert torch.equal(rows, torch.zeros(2, 7))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_equal_the_dense_rows(layout):
    packed, delta = pack(*layout)
    index = torch.randint(0, packed.m, (4, 3))
    index[0, 0], index[0, 1] = 0, packed.m - 1
    found = low_rank_rows(index, *arguments(packed))
    assert found.shape == (4, 3, packed.n) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), delta[index], rtol=1e-5, atol=1e-5)
    every = low_rank_rows(torch.arange(packed.m), *arguments(packed))
    torch.testing.assert_close(every.double(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_rows_of_empty_and_scalar_index(shape):
    packed, delta = pack(*LAYOUTS[1])
    index = torch.full(shape, 7)
    found = low_rank_rows(index, *arguments(packed)).double()
    torch.testing.assert_close(found, delta[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient_is_that_of_the_dense_delta(layout):
    packed, delta = pack(*layout)
    x = torch.randn(6, packed.n, requires_grad=True)
    weights = torch.randn(6, packed.m)
    (low_rank(x, *arguments(packed, False)).sin() * weights).sum().backward()
    dense = x.detach().double().requires_grad_()
    ((dense @ delta.T).sin() * weights).sum().backward()
    assert relative(x.grad, dense.grad) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    packed, _ = pack(9, 6, [8, 3, 2], [8, 3, 2], 4)
    x = torch.randn(2, 9 if transposed else 6, dtype=torch.float64, requires_grad=True)

    def op(x):
        return low_rank(x, *arguments(packed, transposed))

    torch.autograd.gradcheck(op, x)
    torch.autograd.gradgradcheck(op, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_low_rank(transposed):
    packed, _ = pack(*LAYOUTS[1])
    width = packed.m if transposed else packed.n
    for x in (
        torch.randn(2, 3, width, requires_grad=True),
        torch.randn(width, 4, dtype=torch.bfloat16).T,
        torch.randn(4, 1, width).expand(4, 3, width),
    ):
        torch.library.opcheck(low_rank, (x, *arguments(packed, transposed)))


def test_opcheck_low_rank_rows():
    packed, _ = pack(*LAYOUTS[1])
    for index in (torch.tensor([[0, 32, 5], [1, 1, 2]]), torch.tensor(3), torch.arange(9)[::2]):
        torch.library.opcheck(low_rank_rows, (index, *arguments(packed)))
