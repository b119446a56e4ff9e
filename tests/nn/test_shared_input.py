"""q/k/v and gate/up make their products together, by Triton and by look-up."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import deltamix_kernels as dk
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import FEW_BITS
from tiny_pairs import DECODER, FAMILIES, logits, make_pair, quick, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import delta_modules, weight_of
from deltamix_hf.ops import dispatch, lookup
from deltamix_hf.ops.dispatch import REFERENCE, TRITON, VARIABLE

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.untraced

IDS = token_ids(2, 5)


def _build():
    """One block; k_proj and v_proj are large enough to be packed."""
    sizes = {**DECODER, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A pair and the folder of its delta, compressed without Triton's interpreter (30 s)."""
    folder = tmp_path_factory.mktemp("one block")
    source = make_pair(
        "one block", folder, replace(FAMILIES["llama"], build=_build, budget={"ratio": 0.1})
    )
    source.compress(**quick("deltamix-kl"), bits=FEW_BITS).save_pretrained(folder / "delta")
    return source, folder / "delta"


@pytest.fixture(params=[TRITON, REFERENCE])
def kernel(request, monkeypatch, repo):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture
def model(repo, kernel):
    """The saved delta, loaded anew; in float16 for the kernels, which multiply no float32."""
    source, folder = repo
    model = source.load(folder)
    return model.to(torch.float16) if kernel == TRITON else model


def outputs(model, kernel, seed=0):
    """Logits; by Triton of one block's MLP alone: its interpreter takes a second a launch."""
    if kernel == REFERENCE:
        return logits(model, token_ids(2, 5, seed=seed))
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return mlp(x.half())


@pytest.fixture
def close(kernel):
    small = 0.01 if kernel == TRITON else 1e-5
    return {"rtol": small, "atol": small}


@pytest.fixture
def launches(monkeypatch, kernel):
    """How many matrices each pair of launches, or each look-up of several, had."""
    counted = []
    if kernel == TRITON:
        plain = dk.DecodePlan.linear

        def linear(self, x, weights, biases):
            counted.append(len(weights))
            return plain(self, x, weights, biases)

        monkeypatch.setattr(dk.DecodePlan, "linear", linear)
    else:
        shared = lookup.shared

        def together(x, matrices):
            counted.append(len(matrices))
            return shared(x, matrices)

        monkeypatch.setattr(lookup, "shared", together)
    return counted


def alone(model):
    """The same model, every layer on its own."""
    twin = copy.deepcopy(model)
    for group in groups(twin):
        for member in group.members:
            member.dm_shared_input = None
    return twin


def groups(model):
    found = [
        m.dm_shared_input for m in delta_modules(model).values() if hasattr(m, "dm_shared_input")
    ]
    return {id(group): group for group in found if group is not None}.values()


def test_fewer_launches_and_the_same_outputs(model, launches, kernel, close):
    members = [len(group.members) for group in groups(model)]
    assert {2, 3} <= set(members) <= {1, 2, 3}  # gate and up; q, k and v; others
    with torch.no_grad():
        found = outputs(model, kernel)
        wanted = [1, 2] if kernel == TRITON else sorted(n for n in members if n > 1)
        assert sorted(launches) == wanted  # alone, a layer takes no look-up of several
        assert torch.equal(found, outputs(model, kernel))
        assert not any(group._running for group in groups(model))
        torch.testing.assert_close(found, outputs(alone(model), kernel), **close)


def test_triton_and_look_up_agree(model, kernel, monkeypatch, close):
    found = outputs(model, kernel)
    monkeypatch.setenv(VARIABLE, REFERENCE)
    torch.testing.assert_close(outputs(model, kernel), found, **close)


def test_plans_follow_codes_that_change_or_move(model, launches, close):
    group = next(group for group in groups(model) if len(group.members) == 2)
    one, two = group.members
    x = torch.randn(2, one.in_features, dtype=one.weight.dtype)

    def both():
        return [one(x), two(x)]

    with torch.no_grad():
        first = both()
        one.dm_v.data = one.dm_v.data.clone()  # as `Module.to` does
        assert all(map(torch.equal, first, both()))
        one.dm_ranks[:, 1:] += 128  # scales of both sides twice as large
        changed = both()
    base = [F.linear(x, weight_of(layer), layer.bias) for layer in (one, two)]
    torch.testing.assert_close(changed[0] - base[0], 4 * (first[0] - base[0]), **close)
    assert torch.equal(changed[1], first[1])


@pytest.mark.parametrize("kernel", [TRITON], indirect=True)
def test_no_plan_is_made_while_a_graph_is_recorded(model, monkeypatch):
    layer = next(group for group in groups(model)).members[0]
    x = torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    with torch.no_grad(), pytest.raises(DeltaMixError, match="run the model once"):
        layer(x)


def test_a_tensor_that_changes_between_two_layers(model, close):
    """The second must not get what was computed of the first one's input."""
    group = next(group for group in groups(model) if len(group.members) == 2)
    one, two = group.members
    x = torch.randn(2, one.in_features, dtype=one.weight.dtype)
    with torch.no_grad():
        one(x)
        found = two(x.mul_(2))
        one(x)
        expected = two(x)
    torch.testing.assert_close(found, expected, **close)


def test_a_shadow_of_a_layer_uses_its_own_tensors(model):
    layer = next(group for group in groups(model)).members[0]
    x = torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        shadow = layer.with_tensors({"weight": torch.zeros_like(layer.weight)})
        delta = shadow.straight(x)
        torch.testing.assert_close(
            delta + F.linear(x, weight_of(layer), layer.bias), layer(x), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [REFERENCE], indirect=True)  # test_kernels.py has Triton's
def test_half_precision(model, dtype):
    half = model.to(dtype)
    with torch.no_grad():
        found, expected = logits(half, IDS), logits(alone(half), IDS)
    error = (found - expected).norm() / expected.norm()
    assert found.dtype == dtype and error < 0.02


@pytest.mark.parametrize("kernel", [REFERENCE], indirect=True)  # the interpreter has one thread
def test_threads_do_not_take_each_others(model):
    batches = [token_ids(2, 5, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [logits(model, ids) for ids in batches]

    def ask(i):
        with torch.no_grad():
            return [logits(model, batches[i]) for _ in range(10)]

    with ThreadPoolExecutor(len(batches)) as pool:
        answers = list(pool.map(ask, range(len(batches))))
    for found, wanted in zip(answers, expected, strict=True):
        assert all(torch.equal(one, wanted) for one in found)


def test_gradients_take_the_single_path(model, launches):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert not launches and embedded.grad is not None


def test_another_tensor_dissolves_the_group_in_time(model, close):
    group = next(group for group in groups(model) if len(group.members) > 1)
    one, other = group.members[:2]
    x = torch.randn(2, one.in_features, dtype=one.weight.dtype)
    with torch.no_grad():
        expected = [layer(x) for layer in (one, other)]
        for _ in range(group.most_misses + 1):  # each with a tensor of its own
            for layer, y in zip((one, other), expected, strict=True):
                torch.testing.assert_close(layer(x.clone()), y, **close)
    assert one.dm_shared_input.members == [one] and other.dm_shared_input.members == [other]


def test_cross_attention_is_left_alone(delta):
    """Its q reads another tensor than its k and v: the first call would differ from the second."""
    repo = delta("t5", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    several = [group.members for group in groups(model) if len(group.members) > 1]
    grouped = {id(member) for members in several for member in members}
    alone = {name for name, m in delta_modules(model).items() if id(m) not in grouped}
    crossing = {name for name in delta_modules(model) if "EncDecAttention" in name}
    assert crossing and crossing <= alone and grouped
    with torch.no_grad():
        assert torch.equal(logits(model), logits(model))


def test_a_copy_has_groups_of_its_own(model, kernel):
    twin = copy.deepcopy(model)
    for ours, theirs in zip(groups(model), groups(twin), strict=True):
        assert not {id(m) for m in ours.members} & {id(m) for m in theirs.members}
    with torch.no_grad():
        assert torch.equal(outputs(model, kernel), outputs(twin, kernel))


def test_compiled(model, kernel, close):
    torch.compiler.reset()
    mlp = model.model.layers[0].mlp
    x, more = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), mlp(x), **close)
        twin = copy.deepcopy(mlp)
        for layer in (twin.gate_proj, twin.up_proj, twin.down_proj):
            weight_of(layer).zero_()
            layer.dm_ranks[:, 1:] = 0  # scales
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(more), mlp(more), **close)
        of_twin = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
        assert not of_twin(more).any()  # by its own numbers


@pytest.mark.parametrize("kernel", [REFERENCE], indirect=True)
def test_compiled_whole(model):
    torch.compiler.reset()
    with torch.no_grad():
        expected = logits(model, IDS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, IDS), expected, rtol=1e-5, atol=1e-5)
