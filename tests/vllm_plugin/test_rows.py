"""What of the vLLM plug-in runs without vLLM: which rows take which delta, and norms by row."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from deltamix_hf import DeltaMixError
from deltamix_hf.vllm.batch import Batch, by_row


@pytest.fixture
def batch():
    """Three requests: delta 1 with two tokens, the base with one, delta 2 with three."""
    batch = Batch()
    batch.set((1, 1, 0, 2, 2, 2), (1, 0, 2))
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
    batch.set(deltas, ())
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
