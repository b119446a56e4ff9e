"""What of the vLLM plug-in runs without vLLM: which rows take which delta, and norms by row."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from deltamix_hf import DeltaMixError
from deltamix_hf.vllm.batch import LARGEST, Batch, by_row, keep_finite


@pytest.fixture
def batch():
    """Three requests: delta 1 with two tokens, the base with one, delta 2 with three."""
    batch = Batch()
    batch.set((1, 1, 0, 2, 2, 2), (1, 0, 2), {1, 2})
    return batch


def rows(groups):
    return {number: found.tolist() for number, found in groups}


def test_rows_of_all_tokens(batch):
    x = torch.zeros(6, 4)
    assert rows(batch.groups(x, {1, 2})) == {1: [0, 1], 2: [3, 4, 5]}
    assert rows(batch.groups(x, {2})) == {2: [3, 4, 5]}


def test_the_head_sees_chosen_rows_or_a_slice_of_the_tokens(batch):
    x = torch.zeros(6, 4)
    assert rows(batch.groups(x[[1, 2, 5]], {1, 2}, head=True)) == {1: [0], 2: [2]}
    assert rows(batch.groups(x[1:4], {1, 2}, head=True)) == {1: [0], 2: [2]}
    assert rows(batch.groups(x[3:6], {1, 2}, head=True)) == {2: [0, 1, 2]}


def test_rows_of_another_number_are_refused_only_if_it_matters(batch):
    assert batch.groups(torch.zeros(8, 4), {3}) == []
    with pytest.raises(DeltaMixError, match="8 rows of a batch of 6"):
        batch.groups(torch.zeros(8, 4), {1})


@pytest.mark.parametrize(("tokens", "wanted"), [((1, 3), (1,)), ((1, 1), (3,))])
def test_a_delta_that_is_not_loaded_is_refused(batch, tokens, wanted):
    with pytest.raises(DeltaMixError, match="names delta 3, which is not loaded"):
        batch.set(tokens, wanted, {1, 2})
    assert batch.tokens == (1, 1, 0, 2, 2, 2)


def test_what_an_attention_layer_keeps_of_deltas_is_finite(batch):
    nan, inf = float("nan"), float("inf")
    seen = []
    layer = nn.Module()
    layer.forward = lambda q, k, shape=None, v=None: seen.extend([k, v])
    keep_finite(layer, batch)
    values = torch.tensor([nan, inf, nan, -inf, 1e30, 5.0])[:, None].repeat(1, 4)
    kept = [0.0, LARGEST, nan, -LARGEST, LARGEST, 5.0]  # the base's row is as it was
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        layer(values.to(dtype), values.to(dtype)[:, :2], 6, v=values.to(dtype))
        for found in seen:
            expected = torch.tensor(kept, dtype=dtype)[:, None].expand_as(found)
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    layer(values.clone(), crossed := values.repeat(2, 1))  # rows of an encoder
    assert torch.isfinite(crossed).all()
    batch.set((0,) * 6, (0,))
    layer(values.clone(), plain := values.clone())
    torch.testing.assert_close(plain, values, equal_nan=True)


class AddingNorm(nn.Module):
    """As vLLM's: with a residual it adds first, writes into it, and returns both."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x, residual=None):
        if residual is None:
            return x * self.weight
        residual += x
        return residual * self.weight, residual


@pytest.mark.parametrize("deltas", [(1, 1, 0, 2, 2, 2), (2,) * 6, (0,) * 6])
def test_a_norm_runs_each_row_by_its_own_weights(deltas):
    batch, norm = Batch(), AddingNorm()
    batch.set(deltas, (), {1, 2})
    for number in (1, 2):
        by_row(norm, batch)[number] = {"weight": nn.Parameter(torch.full((4,), number + 1.0))}
    x, residual = torch.rand(6, 4), torch.rand(6, 4)
    weights = torch.tensor(deltas)[:, None] + 1.0
    torch.testing.assert_close(norm(x), x * weights)
    sums = x + residual
    y, after = norm(x, residual)
    torch.testing.assert_close(y, sums * weights)
    torch.testing.assert_close(after, sums)
    assert norm.weight.tolist() == [1.0] * 4


def test_the_entry_point_imports_nothing_of_vllm():
    code = (
        "import sys, deltamix_hf.vllm; print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
