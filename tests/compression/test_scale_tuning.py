"""Tuning the stored scales: what it runs on, what it changes, and that it helps."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_pairs import fine_tune, logits, make_config, relative, token_ids
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from deltamix_hf.compression import scale_tuning
from deltamix_hf.compression.scale_tuning import TuningBatch, tune, tuning_batches
from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.quantization import uniform

SIZE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
SIZE |= {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ONE_BATCH = [token_ids(8, 16)]  # so that none is kept out
BATCHES = [token_ids(4, 16, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(cls, **options)`: a tied fine-tune and a copy of it compressed without tuning."""
    made: dict = {}

    def get(cls=LlamaForCausalLM, **options):
        key = (cls, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("pair")
            torch.manual_seed(0)
            config = {LlamaForCausalLM: LlamaConfig, GemmaForCausalLM: GemmaConfig}[cls]
            model = cls(config(**SIZE)).eval()
            model.save_pretrained(folder / "base")
            fine_tune(model)
            model.save_pretrained(folder / "tuned")
            how = make_config(folder / "base", method="delta-come", ratio=0.2, **options)
            made[key] = model, cls.from_pretrained(folder / "tuned", quantization_config=how)
        exact, packed = made[key]
        return exact, copy.deepcopy(packed)

    return get


GAUSSIAN = {"allocation": "matrix", "codebook": "gaussian", "group_size": 0}


def ranks(model):
    return {name: module.dm_ranks.clone() for name, module in delta_modules(model).items()}


def left_scales(module):
    """Scales of U [k, groups], float32."""
    first = 1 + uniform.group_count(module.in_features, module.packed().group_sizes[0])
    return uniform.scales_from_bits(module.dm_ranks[:, first:].contiguous())


def loss(model, data):
    """Mean KL(fine-tune ‖ model) over the texts, written out."""
    total = count = 0
    for item in data:
        found = logits(model, item.ids).flatten(0, 1)[item.positions].log_softmax(-1)
        wanted = item.wanted.float()
        total += float((wanted.exp() * (wanted - found)).sum())
        count += len(item.positions)
    return total / count


@pytest.mark.parametrize("options", [{}, GAUSSIAN], ids=["min-max", "gaussian"])
def test_a_gain_of_zero_changes_nothing(pair, options):
    _, model = pair(**options)
    before, modules = logits(model), delta_modules(model)
    assert {"model.embed_tokens", "lm_head"} < modules.keys()
    for module in modules.values():
        scale_tuning._open(module, torch.zeros(len(module.dm_ranks)))
    assert relative(logits(model), before) < 1e-5
    for module in modules.values():
        module.__dict__.pop("forward")
    assert torch.equal(logits(model), before)
    assert not any("forward" in module.__dict__ for module in modules.values())


@pytest.mark.parametrize("options", [{}, GAUSSIAN], ids=["min-max", "gaussian"])
def test_folded_gains_are_the_gains(pair, options):
    _, model = pair(**options)
    modules = delta_modules(model)
    random = torch.Generator().manual_seed(0)
    gains = {
        id(m.dm_ranks): 0.3 * torch.randn(len(m.dm_ranks), generator=random)
        for m in modules.values()
    }
    for module in modules.values():
        scale_tuning._open(module, gains[id(module.dm_ranks)])
    plain, wanted, before = pair(**options)[1], logits(model), ranks(model)
    tied = {id(module.dm_ranks): module for module in modules.values()}
    assert len(tied) == len(modules) - 1  # the head shares the table's
    for module in modules.values():
        module.__dict__.pop("forward")
    for key, module in tied.items():
        scale_tuning._fold(module, gains[key].exp())
    # bfloat16 rounds scales by up to 2^-9, the gains change them by a third
    lost, moved = relative(logits(model), wanted), relative(logits(plain), wanted)
    assert lost < 0.02 * moved
    for name, module in modules.items():
        first = 1 + uniform.group_count(module.weight.shape[1], module.packed().group_sizes[0])
        assert torch.equal(module.dm_ranks[:, :first], before[name][:, :first])


@pytest.mark.parametrize("options", [{}, GAUSSIAN], ids=["min-max", "gaussian"])
def test_tuning_lowers_the_divergence(pair, options):
    exact, model = pair(**options)
    data = tuning_batches(exact, ONE_BATCH, 0)
    before = loss(model, data)
    losses = tune(model, data, 12)
    assert len(losses) == 12 and losses[0] == pytest.approx(before, rel=1e-3)
    assert loss(model, data) == pytest.approx(losses[-1], rel=0.05)  # bfloat16 scales
    assert losses[-1] < 0.95 * before


def test_the_first_step_is_one_learning_rate_even_for_tied_matrices(pair):
    """Adam's first step is the learning rate; a gain that is folded twice would show as two."""
    exact, model = pair()
    _, before = pair()
    tune(model, tuning_batches(exact, ONE_BATCH, 0), 1)
    old = delta_modules(before)
    for name, module in delta_modules(model).items():
        if name == "model.embed_tokens":
            continue  # the same tensor as the head's
        step = (left_scales(module) / left_scales(old[name])).log().abs().mean()
        assert float(step) == pytest.approx(scale_tuning.LEARNING_RATE, rel=0.1), name
    assert model.lm_head.dm_ranks is model.model.embed_tokens.dm_ranks


def test_gains_that_do_not_help_on_other_text_are_dropped(pair):
    exact, model = pair()
    data = tuning_batches(exact, BATCHES, 0)
    own = tuning_batches(
        model, BATCHES[:1], 0
    )  # kept out: here nothing can be better than no change
    before = ranks(model)
    assert len(tune(model, [*own, *list(data)[1:]], 4)) == 4
    assert all(torch.equal(before[name], now) for name, now in ranks(model).items())


def test_tuning_is_deterministic_and_leaves_the_rest_alone(pair):
    exact, one = pair()
    _, two = pair()
    one.requires_grad_(False)
    for model in (one, two):
        model.model.norm.weight.requires_grad_(True)
        state = {n: p.clone() for n, p in model.named_parameters() if "dm_ranks" not in n}
        flags = [p.requires_grad for p in model.parameters()]
        tune(model, tuning_batches(exact, BATCHES, 3), 3)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, state[n]) for n, p in model.named_parameters() if n in state)
    found, again = ranks(one), ranks(two)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_scaled_embeddings_keep_their_scales_and_so_do_their_heads(pair):
    exact, model = pair(GemmaForCausalLM)
    before = ranks(model)
    tune(model, tuning_batches(exact, ONE_BATCH, 0), 2)
    kept = {name for name, now in ranks(model).items() if torch.equal(now, before[name])}
    assert kept == {"model.embed_tokens", "lm_head"}


def test_tuning_batches(pair):
    exact, _ = pair()
    data = tuning_batches(exact, [token_ids(24, 16), token_ids(1, 700)], 0)  # 128 tokens at a time
    assert [tuple(item.ids.shape) for item in data] == [(8, 16), (8, 16), (8, 16), (1, 128)]
    for item in data:
        assert torch.equal(item.positions, torch.arange(item.ids.numel()))
        wanted = logits(exact, item.ids).flatten(0, 1).log_softmax(-1)
        assert item.wanted.dtype == torch.float16
        torch.testing.assert_close(item.wanted.float(), wanted, rtol=1e-3, atol=1e-3)
    most = {"most_bytes": 2 * 10 * 256 * 2}  # ten predictions of each of two
    short, again, other = (tuning_batches(exact, BATCHES[:2], seed, **most) for seed in (0, 0, 1))
    for item, same, unlike in zip(short, again, other, strict=True):
        assert len(item.positions) == 10 and item.positions.unique().equal(item.positions)
        assert torch.equal(item.positions, same.positions)
        assert not torch.equal(item.positions, unlike.positions)
        whole = logits(exact, item.ids).flatten(0, 1).log_softmax(-1)[item.positions]
        torch.testing.assert_close(item.wanted.float(), whole, rtol=1e-3, atol=1e-3)


def test_nothing_to_tune(pair):
    exact, model = pair()
    data = tuning_batches(exact, BATCHES, 0)
    assert not tuning_batches(exact.model, BATCHES, 0)  # no logits
    before = ranks(model)
    assert tune(model, [], 4) == tune(model, data, 0) == tune(exact, data, 4) == []
    assert all(torch.equal(before[name], now) for name, now in ranks(model).items())


def test_text_that_meets_no_packed_matrix(pair):
    """As where a vision tower was fine-tuned and the text runs past it."""
    exact, packed = pair()
    model = copy.deepcopy(exact)
    model.spare = packed
    before = ranks(model)
    tune(model, tuning_batches(exact, BATCHES, 0), 2)
    assert before and all(torch.equal(before[name], now) for name, now in ranks(model).items())


def test_logits_that_are_masked_out(pair):
    """Some models set the logits of unused words to the least float; KL must stay finite."""
    exact, model = pair()
    handles = []
    for each in (exact, model):
        least = torch.finfo(torch.float32).min
        mask = torch.zeros(256).index_fill_(0, torch.tensor([7, 9]), least)
        handles.append(each.lm_head.register_forward_hook(lambda m, a, y, mask=mask: y + mask))
    data = tuning_batches(exact, BATCHES, 0)
    losses = tune(model, data, 2)
    for handle in handles:
        handle.remove()
    assert isinstance(data[0], TuningBatch) and torch.isfinite(data[0].wanted).all()
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(torch.isfinite(left_scales(m)).all() for m in [model.lm_head])


@torch.no_grad()
def test_the_recorded_divergence(pair):
    """Of the texts kept out alone; never below 0, though predictions are kept in half precision."""
    exact, packed = pair()
    data = tuning_batches(exact, BATCHES, seed=0)
    itself = scale_tuning.validation_kl(exact, data)
    assert 0 <= itself["kl"] < 1e-6
    kept = scale_tuning.validation_rows(data)
    total = count = 0
    for item in kept:
        wanted, found = (
            model(item.ids).logits.flatten(0, 1)[item.positions].double().log_softmax(-1)
            for model in (exact, packed)
        )
        total += float((wanted.exp() * (wanted - found)).sum())
        count += len(item.positions)
    figures = scale_tuning.validation_kl(packed, data)
    assert figures["positions"] == count
    assert figures["kl"] == pytest.approx(total / count, rel=1e-3)
    assert scale_tuning.validation_kl(packed, tuning_batches(exact, ONE_BATCH, seed=0)) == {}
