"""Moments of every expert, against hooks on experts that are layers of their own."""

from __future__ import annotations

import pytest
import torch
from tiny_pairs import EXPERTS, token_ids
from torch import nn

from deltamix_hf.calibration import expert_statistics
from deltamix_hf.calibration.statistics import collect
from deltamix_hf.linalg.second_moments import SecondMoment
from deltamix_hf.nn.experts import Expert, FusedWeight

MOE = "model.layers.1.mlp.experts"


def targets_of(model: nn.Module) -> dict[str, Expert]:
    names = [f"{MOE}.gate_up_proj", f"{MOE}.down_proj"]
    fused = [FusedWeight(model, name) for name in names]
    return {f"{f.name}.{i}": f.expert(i) for f in fused for i in range(EXPERTS)}


class Apart(nn.Module):
    """Mixtral's experts, each with two linear layers."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.act_fn, self.num_experts = experts.act_fn, EXPERTS
        for name in ("gate_up_proj", "down_proj"):
            layers = nn.ModuleList()
            for weight in getattr(experts, name):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data.copy_(weight.detach())
                layers.append(layer)
            setattr(self, name, layers)

    def forward(self, hidden, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden)
        for number in range(EXPERTS):
            token, place = torch.where(top_k_index == number)
            gate, up = self.gate_up_proj[number](hidden[token]).chunk(2, -1)
            y = self.down_proj[number](self.act_fn(gate) * up)
            out = out.index_add(0, token, y * top_k_weights[token, place, None])
        return out


@pytest.fixture(scope="module")
def both(pair):
    """Statistics of the same calibration, of fused experts and of layers, and the predictions."""
    source = pair("mixtral")
    batches = [token_ids(4, 64, seed=3), token_ids(4, 64, seed=4)]
    model = source.load(source.tuned)
    fused = collect(model, targets_of(model), batches, fisher=True)
    layer = model.model.layers[1].mlp
    layer.experts = Apart(layer.experts)
    layers = {name: model.get_submodule(name) for name in fused[0]}
    return fused, collect(model, layers, batches, fisher=True)


def test_every_experts_moments(both):
    (found, scored), (expected, also_scored) = both
    assert scored == also_scored and len(found) == 2 * EXPERTS
    for name, layer in expected.items():
        assert found[name].inputs.count == layer.inputs.count > expert_statistics.FEWEST
        torch.testing.assert_close(found[name].inputs.mean(), layer.inputs.mean())
        ours, its = found[name].gradients.mean(scored), layer.gradients.mean(scored)
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-6 * float(its.abs().max()))


def test_every_choice_is_counted_once(both):
    (found, _), _ = both
    tokens = sum(found[f"{MOE}.down_proj.{i}"].inputs.count for i in range(EXPERTS))
    assert tokens == 2 * 4 * 64 * 2  # batches, rows, length, experts of a token


def test_experts_with_few_tokens_are_left_out(pair):
    source = pair("mixtral")
    model = source.load(source.tuned)
    found, _ = collect(model, targets_of(model), [token_ids(2, 8)], fisher=True, fewest=10_000)
    assert not found
    assert "forward" not in vars(model.get_submodule(MOE))  # as it was


def test_without_fisher_inputs_alone(pair):
    source = pair("mixtral")
    model = source.load(source.tuned)
    found, _ = collect(model, targets_of(model), [token_ids(4, 64)], fisher=False)
    assert found and all(layer.gradients is None for layer in found.values())


def test_many_experts_share_the_memory_of_one_layer():
    """128 experts of Qwen3-30B-A3B: their input moments take less than two layers may."""
    inputs, gradients = (expert_statistics.expert_moment(dim, 128) for dim in (2048, 1536))
    assert inputs.kind == gradients.kind == "sketch"
    assert 128 * inputs.nbytes < 2 * SecondMoment(6144).nbytes
