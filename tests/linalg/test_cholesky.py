"""Factors of whole matrices and of halves: against the product, dead coordinates, wrong input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.linalg import cholesky as module
from deltamix_hf.linalg.cholesky import cholesky, cholesky32

HALVES = 6  # larger ones are factorised in halves


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", HALVES)
    monkeypatch.setattr(module, "_COPIED", 3)


def gram(size, seed=0, rows=None):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 2 * size, size, generator=random, dtype=torch.float64)
    x = x * torch.logspace(0, -3, size, dtype=torch.float64)
    return x.T @ x


def wanted(matrix, damping, order):
    matrix = matrix + damping * matrix.diagonal().mean() * torch.eye(
        len(matrix), dtype=torch.float64
    )
    return matrix if order is None else matrix[order][:, order]


@pytest.mark.parametrize(("factor", "digits"), [(cholesky, 1e-12), (cholesky32, 1e-6)])
@given(size=st.integers(1, 17), damping=st.sampled_from([0.0, 0.1]), shuffled=st.booleans())
def test_the_product_is_the_matrix(factor, digits, size, damping, shuffled):
    matrix = gram(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1)) if shuffled else None
    before, lower = matrix.clone(), factor(matrix, damping, order)
    expected = wanted(matrix, damping, order)
    scale = expected.diagonal().sqrt()
    off = (lower.double() @ lower.double().T - expected) / scale / scale[:, None]
    assert off.abs().max() < digits and torch.equal(lower, lower.tril())
    assert lower.dtype == (torch.float64 if factor is cholesky else torch.float32)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("factor", [cholesky, cholesky32])
@pytest.mark.parametrize("dead", [0, 5, 12])
def test_dead_coordinates_stand_alone(factor, dead):
    matrix = gram(13)
    matrix[dead], matrix[:, dead] = 0, 0
    lower = factor(matrix).double()
    matrix[dead, dead] = 1
    assert torch.allclose(lower @ lower.T, matrix, atol=1e-6)


@pytest.mark.parametrize("factor", [cholesky, cholesky32])
def test_a_singular_matrix_is_damped(factor):
    matrix = gram(16, rows=5)
    lower = factor(matrix).double()
    scale = matrix.diagonal().sqrt()
    off = (lower @ lower.T - matrix) / scale / scale[:, None]
    assert 0 <= off.diagonal().max() <= 1e-4 and torch.isfinite(lower).all()


@pytest.mark.parametrize("factor", [cholesky, cholesky32])
@pytest.mark.parametrize("place", [2, 9])
def test_what_has_no_factor_is_refused(factor, place):
    matrix = torch.eye(12)
    matrix[place, place - 1] = matrix[place - 1, place] = 2.0
    with pytest.raises(ValueError, match="the 12 x 12 Hessian is not positive definite"):
        factor(matrix)
    matrix[place, 0] = torch.nan
    with pytest.raises(ValueError, match="the Hessian holds NaN or infinity"):
        factor(matrix)
