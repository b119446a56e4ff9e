"""q/k/v and gate/up share x·V̂ᵀ, by Triton and by look-up, and nothing else changes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import deltamix_kernels as dk
import pytest
import torch
from kernel_cases import FEW_BITS, large_blocks
from tiny_pairs import DECODER, FAMILIES, logits, make_pair, quick, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.ops import cpu
from deltamix_hf.ops.dispatch import REFERENCE, TRITON, VARIABLE

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.interpreter

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
    large_blocks(monkeypatch)
    return request.param


@pytest.fixture
def model(repo, kernel):
    """The saved delta, loaded anew."""
    source, folder = repo
    return source.load(folder)


@pytest.fixture
def launches(monkeypatch, kernel):
    """How many matrices each shrink launch, or each look-up of several, had."""
    counted = []
    module, name = (dk, "shrink") if kernel == TRITON else (cpu, "down_project")
    plain = getattr(module, name)

    def shrink(x, matrices, *rest):
        counted.append(len(matrices))
        return plain(x, matrices, *rest)

    monkeypatch.setattr(module, name, shrink)
    monkeypatch.setattr(dk.launch, "shrink", shrink if kernel == TRITON else dk.shrink)
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


def test_fewer_launches_and_the_same_logits(model, launches, kernel):
    members = [len(group.members) for group in groups(model)]
    assert sorted(members) == [2, 3]  # gate and up; q, k and v
    with torch.no_grad():
        found = logits(model, IDS)
        assert sorted(n for n in launches if n > 1) == sorted(members)
        again = logits(model, IDS)
    assert torch.equal(found, again)
    assert not any(group._running for group in groups(model))
    with torch.no_grad():
        expected = logits(alone(model), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [TRITON], indirect=True)
def test_triton_and_look_up_agree(model, monkeypatch):
    with torch.no_grad():
        found = logits(model, IDS)
        monkeypatch.setenv(VARIABLE, REFERENCE)
        torch.testing.assert_close(logits(model, IDS), found, rtol=1e-4, atol=1e-4)


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
    assert set(launches) <= {1} and embedded.grad is not None


def test_another_tensor_dissolves_the_group_in_time(model, launches):
    group = next(iter(groups(model)))
    one, other = group.members[:2]
    x = torch.randn(2, one.in_features)
    with torch.no_grad():
        expected = [layer(x) for layer in (one, other)]
        for _ in range(group.most_misses + 1):  # each with a tensor of its own
            for layer, y in zip((one, other), expected, strict=True):
                torch.testing.assert_close(layer(x.clone()), y, rtol=1e-5, atol=1e-5)
    assert one.dm_shared_input is None and other.dm_shared_input is None


def test_cross_attention_is_left_alone(delta):
    """Its q reads another tensor than its k and v: the first call would differ from the second."""
    repo = delta("t5", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    grouped = {id(member) for group in groups(model) for member in group.members}
    alone = {name for name, m in delta_modules(model).items() if id(m) not in grouped}
    crossing = {name for name in delta_modules(model) if "EncDecAttention" in name}
    assert crossing and crossing <= alone and grouped
    with torch.no_grad():
        assert torch.equal(logits(model), logits(model))


def test_a_copy_has_groups_of_its_own(model):
    twin = copy.deepcopy(model)
    for ours, theirs in zip(groups(model), groups(twin), strict=True):
        assert not {id(m) for m in ours.members} & {id(m) for m in theirs.members}
    with torch.no_grad():
        assert torch.equal(logits(model, IDS), logits(twin, IDS))


def test_compiled_whole(model):
    torch.compiler.reset()
    with torch.no_grad():
        expected = logits(model, IDS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, IDS), expected, rtol=1e-5, atol=1e-5)
