"""Experts by the grouped kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from expert_cases import M, N, factors, some_experts
from kernel_cases import DEVICE, TOLERANCES
from tiny_pairs import relative

from deltamix_hf.ops import dispatch
from deltamix_hf.ops.dispatch import REFERENCE, TRITON, VARIABLE
from deltamix_hf.ops.experts import add_by_kernels
from deltamix_hf.quantization.packed_delta import PackedDelta

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.untraced


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv(VARIABLE, TRITON)


def call(packed, load, dtype):
    """Whether the kernels ran, their y, and what it should be: by rows of each expert."""
    x = torch.randn(sum(load), N).to(dtype)
    before = torch.randn(sum(load), M).to(dtype)
    experts = packed.split()
    added = [
        rows.double() @ (torch.zeros(N, M).double() if own is None else own.dense().double().T)
        for rows, own in zip(x.split(load), experts, strict=True)
    ]
    y = before.clone().to(DEVICE)
    ends = torch.tensor(load).cumsum(0).to(DEVICE, torch.int32)
    with torch.no_grad():
        ran = add_by_kernels(y, packed.to(torch.device(DEVICE)), x.to(DEVICE), ends)
    return ran, y.cpu(), before.double() + torch.cat(added)


@pytest.mark.parametrize(
    "load, dtype",
    [
        ([3, 2, 1, 4, 0], torch.bfloat16),
        ([0, 3, 0, 0, 0], torch.float16),
        ([0, 0, 0, 1, 0], torch.float16),
        ([1] * 5, torch.bfloat16),
    ],
)
def test_each_row_takes_its_experts_factors(load, dtype):
    ran, found, expected = call(PackedDelta.join(some_experts()), load, dtype)
    assert ran
    assert relative(found, expected) < TOLERANCES[dtype]


def test_what_the_kernels_do_not_know_is_left():
    for experts in (some_experts(gaussian=False), [factors([2], [2], True, group=16)]):
        packed = PackedDelta.join(experts)
        x, y = torch.randn(2, N).half(), torch.zeros(2, M).half()
        ends = torch.tensor([2] * len(experts), dtype=torch.int32)
        with torch.no_grad():
            assert not add_by_kernels(y, packed, x, ends)
        assert not y.any()
    packed, x = PackedDelta.join(some_experts()), torch.randn(1, N)
    ends = torch.ones(5, dtype=torch.int32)
    with torch.no_grad():
        assert not add_by_kernels(torch.zeros(1, M), packed, x, ends)  # float32
    y = torch.zeros(1, M).half()
    assert not add_by_kernels(y, packed, x.half(), ends)  # gradients are on


def test_tables_follow_moved_tensors_and_go_with_them():
    packed = PackedDelta.join(some_experts()).to(torch.device(DEVICE))
    x, ends = torch.randn(5, N, device=DEVICE).half(), torch.arange(1, 6, device=DEVICE).int()
    gc.collect()  # what other tests have left
    tables = len(dispatch._tables)
    found = []
    with torch.no_grad():
        for _ in range(2):
            y = torch.zeros(5, M, device=DEVICE).half()
            assert add_by_kernels(y, packed, x, ends)
            found.append(y)
            packed.v.data = packed.v.data.clone()  # as `Module.to` does
            packed.v.data[0] ^= 255  # so an old table would be seen
    assert not torch.equal(*found)
    assert len(dispatch._tables) == tables + 1
    del packed
    gc.collect()
    assert len(dispatch._tables) == tables


@pytest.mark.skipif(torch.device(DEVICE).type != "cpu", reason="the repo is made on the CPU")
def test_a_layer_of_a_model(delta, monkeypatch):
    monkeypatch.setenv(VARIABLE, REFERENCE)
    repo = delta("mixtral", "deltamix-kl")
    experts = repo.pair.load(repo.folder).model.layers[0].mlp.experts
    x, weights, chosen = torch.randn(2, 64), torch.rand(2, 2), torch.tensor([[0, 2], [3, 0]])
    with torch.no_grad():
        expected = experts(x, chosen, weights)
        monkeypatch.setenv(VARIABLE, TRITON)
        experts.to(torch.float16)
        found = experts(x.half(), chosen, weights.half())
    assert relative(found, expected) < TOLERANCES[torch.float16]
    tables = dispatch._tables
    assert all(experts.packed(name).v in tables for name in ("gate_up_proj", "down_proj"))
