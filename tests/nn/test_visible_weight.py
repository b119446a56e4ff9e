"""Who reads or writes the weight of a packed layer meets base + delta."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny_pairs import logits, relative
from torch.nn.utils import parametrizations, parametrize, prune

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import delta_modules, weight_of


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_who_reads_a_weight_gets_the_fine_tunes(delta, family):
    repo = delta(family)
    model, dense = repo.pair.load(repo.folder), repo.pair.load(repo.folder).dequantize()
    for name, module in delta_modules(model).items():
        weight, expected = module.weight, dense.get_submodule(name).weight
        assert isinstance(weight, torch.nn.Parameter) and weight.shape == expected.shape
        assert torch.equal(weight, expected) and torch.equal(weight[3], expected[3])
        x = torch.ones(2, weight.shape[1])
        assert torch.equal(torch.nn.functional.linear(x, weight), x @ expected.T)
    assert torch.equal(logits(model), repo.logits)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert ends[0].weight is ends[1].weight
    whole = ends[0].weight
    assert whole.data_ptr() == ends[1].weight.data_ptr() != weight_of(ends[0]).data_ptr()
    assert torch.equal(torch.from_numpy(whole.numpy()), dense.get_input_embeddings().weight)
    file = io.BytesIO()
    torch.save({"weight": whole}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], dense.get_input_embeddings().weight)
    assert type(copy.deepcopy(whole)) is torch.Tensor
    assert torch.equal(logits(model), repo.logits) and delta_modules(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight[3].mul_(2),
        lambda weight: weight.data.view(-1)[:64].zero_(),
        lambda weight: setattr(weight, "data", weight * 2),
        lambda weight: torch._foreach_mul_([weight], 0.5),
        lambda weight: weight.t().__setitem__(0, 1.0),
        lambda weight: torch.mul(weight, 2, out=weight),
        lambda weight: torch.nn.init.constant_(weight.detach()[3], 0.1),
    ],
    ids=["row", "view", "data", "foreach", "transposed", "out", "init"],
)
def test_who_writes_to_a_weight_changes_the_fine_tune(delta, family, write, tmp_path):
    repo = delta(family)
    model, dense = repo.pair.load(repo.folder), repo.pair.load(repo.folder).dequantize()
    for changed in (model, dense):
        write(changed.get_input_embeddings().weight)
        assert changed.get_output_embeddings().weight is changed.get_input_embeddings().weight
    assert relative(logits(model), logits(dense)) < 1e-5
    assert relative(logits(dense), repo.logits) > 1e-3
    with pytest.raises(DeltaMixError, match="was edited"):
        model.save_pretrained(tmp_path / "delta")


class Twice(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["twice", "weight norm", "spectral norm"],
)
def test_a_packed_layer_is_parametrized_as_the_dense_one(delta, change):
    repo, found = delta("llama"), []
    for dense in (True, False):
        model = repo.pair.load(repo.folder)
        layer = (model.dequantize() if dense else model).model.layers[0].self_attn.q_proj
        torch.manual_seed(0)
        change(layer)
        found.append(logits(model.eval()))
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        found.append(logits(model))
    for expected, packed in zip(found[:2], found[2:], strict=True):
        assert relative(packed, expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [torch.nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3)],
    ids=["weight norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_computed_by_a_hook_is_refused(delta, change):
    repo = delta("llama")
    layer = repo.pair.load(repo.folder).model.layers[0].mlp.up_proj
    with pytest.raises(DeltaMixError, match=r"computed of other tensors .*dequantize\(\) first"):
        change(layer)


def test_a_gradient_reaches_what_is_made_of_a_weight(delta):
    weight = delta("llama").pair.load(delta("llama").folder).lm_head.weight
    made = torch.nn.Parameter(weight.T)  # peft does so
    (made * 3).sum().backward()
    assert torch.equal(made.grad, torch.full_like(made.detach().clone(), 3.0))
