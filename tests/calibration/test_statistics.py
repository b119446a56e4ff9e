"""What is measured on the fine-tune, against explicit sums and exact derivatives."""

from __future__ import annotations

import pytest
import torch
from tiny_pairs import FAMILIES, token_ids
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltamix_hf import DeltaMixError
from deltamix_hf.calibration import statistics
from deltamix_hf.calibration.statistics import collect, metrics_of, prediction
from deltamix_hf.linalg.second_moments import dense
from deltamix_hf.nn.layers import tied_modules
from deltamix_hf.nn.probing import inputs_of

BATCHES = [token_ids(2, 9, seed=0), token_ids(1, 7, seed=1)]
_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
_SMALL |= {"num_hidden_layers": 1, "vocab_size": 6, "pad_token_id": 0}


def family(name):
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


def small(kind):
    """A model whose predictions have few classes, each confident, and its token ids."""
    torch.manual_seed(1)
    model = {
        "causal": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, bos_token_id=1, eos_token_id=2)),
        "classifier": lambda: BertForSequenceClassification(BertConfig(**_SMALL, num_labels=3)),
        "headless": lambda: BertModel(BertConfig(**_SMALL), add_pooling_layer=False),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model.eval(), [token_ids(2, 5, seed=3) % 6, token_ids(1, 4, seed=4) % 6]


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def explicit_inputs(model, modules, batches):
    """Mean of x xᵀ over all calls of each module, float64, from hooks of our own."""
    rows = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: rows[name].append(args[0]))
        for name, module in modules.items()
    ]
    for ids in batches:
        model(**inputs_of(model, ids))
    for handle in handles:
        handle.remove()
    flat = {n: torch.cat([x.flatten(0, -2) for x in xs]).double() for n, xs in rows.items() if xs}
    return {name: x.T @ x / len(x) for name, x in flat.items()}


def exact_fisher(model, modules, batches):
    """Sum over tokens of Jᵀ(diag p - ppᵀ)J for each module, per prediction: a backward pass for
    every class of every prediction. Without logits, JᵀJ of the last hidden state."""
    names = {module: name for name, module in modules.items()}
    totals: dict = {}
    predictions = 0
    for ids in batches:
        outputs: dict = {}

        def keep(module, args, y, outputs=outputs):
            outputs[names[module]] = y

        handles = [module.register_forward_hook(keep) for module in modules.values()]
        values, is_logits = prediction(model(**inputs_of(model, ids)))
        for handle in handles:
            handle.remove()
        weights = values.softmax(-1).detach() if is_logits else torch.ones_like(values)
        scores = values.log_softmax(-1) if is_logits else values
        for score, weight in zip(scores.flatten(), weights.flatten(), strict=True):
            found = torch.autograd.grad(score, list(outputs.values()), retain_graph=True)
            for name, g in zip(outputs, found, strict=True):
                g = g.flatten(0, -2).double()
                totals[name] = totals.get(name, 0) + weight * g.T @ g
        predictions += len(values)
    return {name: total / predictions for name, total in totals.items()}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("fisher", [False, True])
def test_inputs_are_the_mean_of_all_calls(name, fisher):
    model = family(name)
    modules = linears(model)
    wanted = explicit_inputs(model, modules, BATCHES)
    found, scored = collect(model, modules, BATCHES, fisher)
    assert found.keys() == wanted.keys() == modules.keys()
    for module, layer in found.items():
        torch.testing.assert_close(
            layer.inputs.mean().double(), wanted[module], rtol=1e-4, atol=1e-5
        )
        assert (layer.gradients is not None) == fisher
    assert scored == (25 * 4 if fisher else 0)  # 1024 draws would be more than 4 a prediction


def test_layers_of_one_input_share_its_moment():
    model = family("llama")
    found, _ = collect(model, linears(model), BATCHES, fisher=False)
    layer = "model.layers.1"
    q, k, v, o = (found[f"{layer}.self_attn.{x}_proj"].inputs for x in "qkvo")
    gate, up, down = (found[f"{layer}.mlp.{x}_proj"].inputs for x in ("gate", "up", "down"))
    assert q is k and k is v and gate is up
    assert len({id(moment) for moment in (q, o, gate, down)}) == 4
    assert q.count == gate.count == 25


@pytest.mark.parametrize("is_logits", [False, True])
def test_noise_is_drawn_a_few_rows_at_a_time(is_logits):
    values = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    seed = torch.Generator().manual_seed
    whole = statistics._drawn(values, is_logits, seed(0))
    noise = torch.randn(9, 32, generator=seed(0), dtype=torch.float32).double()
    if is_logits:
        p = values.double().softmax(-1)
        noise = p.sqrt() * noise - p * (p.sqrt() * noise).sum(-1, keepdim=True)
    torch.testing.assert_close(whole.double(), noise, rtol=1e-2, atol=1e-5)
    for at_once in (1, 70):
        assert torch.equal(statistics._drawn(values, is_logits, seed(0), at_once), whole)


@pytest.mark.parametrize("kind", ["causal", "classifier", "headless"])
def test_fisher_is_unbiased(kind):
    """Mean over seeds against the exact one: 20 to 50 draws a prediction, each off by about 1."""
    model, batches = small(kind)
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    modules = linears(model) | {n: m for n, m in embeddings.items() if "type" not in n}
    exact = exact_fisher(model, modules, batches)
    seeds = 40 if kind == "classifier" else 12
    runs = [collect(model, modules, batches, True, seed) for seed in range(seeds)]
    assert exact.keys() == runs[0][0].keys()
    for name, wanted in exact.items():
        gradients = [found[name].gradients for found, _ in runs]
        mean = sum(g.mean(s).double() for g, (_, s) in zip(gradients, runs, strict=True)) / seeds
        assert float(mean.trace()) == pytest.approx(float(wanted.trace()), rel=0.15), name
        assert (mean - wanted).norm() < 0.3 * wanted.norm(), name


def test_an_embedding_is_a_layer_on_one_hot_inputs():
    model, batches = small("causal")
    table = {"model.embed_tokens": model.get_input_embeddings()}
    found, scored = collect(model, table, batches, fisher=True)
    use = found["model.embed_tokens"]
    tokens = torch.cat([ids.flatten() for ids in batches])
    assert use.tokens.tolist() == tokens.bincount(minlength=6).tolist()
    metrics = metrics_of([use], scored)
    assert metrics.outputs.sum() == pytest.approx(1)
    assert torch.equal(metrics.inputs, use.gradients.mean(scored))
    found, scored = collect(model, table, batches, fisher=False)
    assert metrics_of([found["model.embed_tokens"]], scored).inputs is None


def test_tied_embeddings_add_both_uses():
    model = family("llama_tied")
    users = tied_modules(model, "model.embed_tokens")
    found, scored = collect(model, users, BATCHES, fisher=True)
    head, table = found["lm_head"], found["model.embed_tokens"]
    metrics = metrics_of([found[name] for name in users], scored)
    uses = [
        (table.tokens / table.tokens.sum(), table.gradients.mean(scored)),
        (head.gradients.mean(scored).diagonal(), head.inputs.mean()),
    ]
    # both marginals of the sum of two Kronecker products are kept
    outputs = sum(a * c.trace() for a, c in uses)
    inputs = sum(c * a.sum() for a, c in uses)
    torch.testing.assert_close(metrics.outputs * metrics.inputs.trace(), outputs)
    torch.testing.assert_close(metrics.inputs * metrics.outputs.sum(), inputs)


def test_metrics_of_few_observations_are_drawn_to_their_mean():
    """As if the prior had been seen: so many times the mean's identity for each dimension."""
    model, batches = small("causal")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    found, scored = collect(model, modules, batches, fisher=True)
    tokens = sum(ids.numel() for ids in batches)
    for name, use in found.items():
        plain, drawn = metrics_of([use], scored), metrics_of([use], scored, prior=2.0)
        for side, seen in ("outputs", scored), ("inputs", tokens):
            if use.tokens is not None:  # its rows are seen with the tokens
                seen = tokens if side == "outputs" else scored
            before, after = (dense(getattr(m, side)).double() for m in (plain, drawn))
            before, after = (t.diag() if t.dim() == 1 else t for t in (before, after))
            worth = 2.0 * len(before)
            mean = before.diagonal().mean() * torch.eye(len(before))
            expected = (seen * before + worth * mean) / (seen + worth)
            torch.testing.assert_close(after, expected, msg=f"{name} {side}")
        again = metrics_of([use], scored, plain.inputs, prior=2.0)
        if use.tokens is None:
            torch.testing.assert_close(again.inputs, drawn.inputs)


def test_encoder_decoder_is_measured_on_both_sides():
    model = family("t5")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    found, scored = collect(model, modules, BATCHES, fisher=True)
    assert scored == 100
    for stack in ("encoder", "decoder"):
        assert found[f"{stack}.embed_tokens"].tokens.sum() == 25
        for name in (f"{stack}.embed_tokens", f"{stack}.block.0.layer.0.SelfAttention.q"):
            assert found[name].gradients.mean(scored).trace() > 0
    cross = "decoder.block.{}.layer.1.EncDecAttention.{}"
    first, second = (found[cross.format(i, "k")].inputs.mean() for i in (0, 1))
    torch.testing.assert_close(first, second)  # the same encoder states
    uses = [found[n] for n in tied_modules(model, "shared") if n in found]
    metrics = metrics_of(uses, scored)
    assert metrics.outputs.shape == (256,) and metrics.inputs.shape == (64, 64)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(fisher, broken):
    model = family("llama").train()
    model.unused = nn.Linear(4, 4)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    modules = linears(model)
    if broken:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
        with pytest.raises(DeltaMixError, match=r"NaN or infinite values at .*: check"):
            collect(model, modules, BATCHES, fisher)
    else:
        found, _ = collect(model, modules, BATCHES, fisher)
        assert modules.keys() - found.keys() == {"unused"}
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_seed_decides():
    model = family("bert")
    name = "bert.encoder.layer.0.output.dense"
    one, two, other = (
        collect(model, linears(model), BATCHES, True, seed)[0][name] for seed in (5, 5, 6)
    )
    assert torch.equal(one.gradients.mean(), two.gradients.mean())
    assert not torch.equal(one.gradients.mean(), other.gradients.mean())
    assert torch.equal(one.inputs.mean(), other.inputs.mean())
