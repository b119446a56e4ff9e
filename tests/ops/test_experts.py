"""Products sorted by expert, against one matrix product for each expert."""

from __future__ import annotations

import pytest
import torch
from expert_cases import M, N, some_experts
from tiny_pairs import relative
from torch import nn
from transformers.integrations import moe

from deltamix_hf import DeltaMixError
from deltamix_hf.ops.experts import (
    add_delta,
    base_product,
    expert_low_rank,
    experts_forward,
    grouped_product,
)
from deltamix_hf.quantization.packed_delta import PackedDelta

BOTH = pytest.mark.parametrize("gaussian", [True, False], ids=["gaussian", "min-max"])
# Tokens of each of the five experts of `some_experts`, whose second has no rank.
LOADS = [[3, 2, 1, 4, 0], [0, 3, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


def ends_of(load: list[int]) -> torch.Tensor:
    return torch.tensor(load).cumsum(0).to(torch.int32)


def delta_product(packed, x, ends):
    return add_delta(x.new_zeros(len(x), packed.m), packed, x, ends)


def by_loops(x, load, experts, transposed=False):
    rows = []
    for part, packed in zip(x.split(load), experts, strict=True):
        dense = torch.zeros(M, N) if packed is None else packed.dense()
        rows.append(part.float() @ (dense if transposed else dense.T))
    return torch.cat(rows)


@BOTH
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("transposed", [False, True])
def test_each_row_takes_its_experts_factors(gaussian, load, transposed):
    experts = some_experts(gaussian)
    x = torch.randn(sum(load), M if transposed else N)
    packed = PackedDelta.join(experts)
    found = expert_low_rank.plain(x, ends_of(load), packed, transposed)
    expected = by_loops(x, load, experts, transposed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("most", [1, 4, 7])
def test_a_few_experts_at_a_time(most):
    load, experts = LOADS[0], some_experts()
    x, packed = torch.randn(10, N), PackedDelta.join(experts)
    found = expert_low_rank.plain(x, ends_of(load), packed, False, most)
    torch.testing.assert_close(found, by_loops(x, load, experts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    load, experts = LOADS[0], some_experts()
    x, packed = torch.randn(10, N, dtype=dtype), PackedDelta.join(experts)
    with torch.no_grad():
        found = delta_product(packed, x, ends_of(load))
    assert found.dtype == dtype
    assert relative(found, by_loops(x, load, experts)) < (1e-6 if dtype.itemsize > 4 else 5e-3)


@pytest.mark.untraced
def test_gradients_reach_the_inputs():
    load, packed = LOADS[0], PackedDelta.join(some_experts())
    x = torch.randn(10, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: delta_product(packed, x, ends_of(load)), x)


@pytest.mark.parametrize(
    ("n", "dtype"), [(64, torch.float32), (7, torch.float32), (8, torch.float64)]
)
def test_grouped_product_of_any_size(n, dtype):
    """torch's own refuses rows that are not whole steps of 16 bytes, and doubles."""
    x, weights = torch.randn(6, n, dtype=dtype), torch.randn(3, n, 5, dtype=dtype)
    found = grouped_product(x, weights, ends_of([2, 0, 4]))
    torch.testing.assert_close(found, torch.cat([x[:2] @ weights[0], x[2:] @ weights[2]]))


class Experts(nn.Module):
    """As small as transformers allows: gated, or not, transposed with biases, or not."""

    def __init__(self, config: object):
        super().__init__()
        gate, shape = config.gate, (3, 32 if config.gate else 16, 8)
        self.num_experts, self.act_fn = 3, nn.SiLU()
        first, last = torch.randn(shape), torch.randn(3, 8, 16)
        if config.transposed:
            first, last = first.mT.contiguous(), last.mT.contiguous()
        name = "gate_up_proj" if gate else "up_proj"
        setattr(self, name, nn.Parameter(first))
        self.down_proj = nn.Parameter(last)
        if config.transposed:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(3, shape[1])))
            self.down_proj_bias = nn.Parameter(torch.randn(3, 8))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


class Settings:
    _experts_implementation = "grouped_mm"

    def __init__(self, gate: bool, transposed: bool):
        self.gate, self.transposed = gate, transposed


def make(gate: bool, transposed: bool) -> nn.Module:
    own = type("Experts", (Experts,), {"forward": Experts.forward, "__init__": Experts.__init__})
    cls = moe.use_experts_implementation(
        own, has_gate=gate, is_transposed=transposed, has_bias=transposed
    )
    return cls(Settings(gate, transposed))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_steps_are_those_of_transformers(gate, transposed):
    module = make(gate, transposed)
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    chosen = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [0, 1]])
    expected = module(x, chosen, weights)

    def project(name, x, ends):
        return base_product(module, name, getattr(module, name), x, ends)

    torch.testing.assert_close(experts_forward(module, x, chosen, weights, project), expected)


def test_experts_spread_over_devices_are_refused():
    module = make(gate=True, transposed=False)
    module._is_expert_parallel = True
    with pytest.raises(DeltaMixError, match="spread over devices"):
        experts_forward(module, torch.randn(1, 8), torch.zeros(1, 1), torch.ones(1, 1), None)
