"""Adapters on top of a delta, through peft: only they train, only they are saved."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_pairs import inputs_of, logits, relative, snapshot, token_ids

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import delta_modules

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def train(model, steps=1) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    ids, losses = token_ids(), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_training_an_adapter_changes_nothing_else(delta, method):
    repo = delta("llama", method)
    model = repo.pair.load(repo.folder)
    model.add_adapter(LoraConfig(**LORA))
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if "lora_" not in k}
    losses = train(model, steps=6)
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name
    model.disable_adapters()
    assert torch.equal(logits(model), repo.logits)


@pytest.mark.parametrize("inside", [False, True], ids=["own folder", "delta folder"])
def test_adapter_is_saved_alone_and_reloads(delta, tmp_path, copied, inside):
    repo = delta("llama")
    folder = copied(repo.folder)
    model = repo.pair.load(folder)
    model.add_adapter(LoraConfig(**LORA))
    train(model)
    target = folder if inside else tmp_path / "adapter"
    before = snapshot(folder)
    model.save_pretrained(target)
    written = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert written - {"generation_config.json"} <= {file.name for file in target.iterdir()}
    if inside:  # the delta itself must still be there
        after = snapshot(folder)
        assert all(after[name] == before[name] for name in before)
        again = repo.pair.load(folder)
    else:
        assert {file.name for file in target.iterdir()} <= written
        again = repo.pair.load(folder)
        again.load_adapter(target)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), repo.logits)


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_peft_model_round_trip(delta, tmp_path, method):
    repo = delta("llama", method)
    model = get_peft_model(repo.pair.load(repo.folder), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(repo.pair.load(repo.folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_merged_adapter_is_refused_until_dense(delta, tmp_path, method):
    """Merging writes into the base weight, which a delta repo cannot hold."""
    repo = delta("llama", method)
    model = get_peft_model(repo.pair.load(repo.folder), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert delta_modules(merged)
    assert relative(logits(merged), expected) < 1e-5
    with pytest.raises(DeltaMixError, match="was edited"):
        merged.save_pretrained(tmp_path / "delta")
    assert not list(tmp_path.iterdir())
    merged.dequantize()
    merged.save_pretrained(tmp_path / "dense")
    assert relative(logits(repo.pair.load(tmp_path / "dense")), expected) < 1e-5


LINEAR, TOKENS = ["q_proj", "up_proj"], ["embed_tokens"]
TUNERS = {
    "lora": LoraConfig(r=4, target_modules=LINEAR + TOKENS),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "dora embedding": LoraConfig(r=4, target_modules=TOKENS, use_dora=True),
    "pissa": LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "lora and tokens": LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[5, 6]),
    "tokens": peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=TOKENS),
    "adalora": peft.AdaLoraConfig(target_modules=LINEAR, total_step=10),
    "boft": peft.BOFTConfig(target_modules=LINEAR, boft_block_size=4),
    "oft": peft.OFTConfig(target_modules=LINEAR, oft_block_size=8),
    "hra": peft.HRAConfig(target_modules=LINEAR),
    "shira": peft.ShiraConfig(target_modules=LINEAR, r=4),
    "ia3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["up_proj"]),
    "loha": peft.LoHaConfig(target_modules=LINEAR),
    "lokr": peft.LoKrConfig(target_modules=LINEAR),
    "vera": peft.VeraConfig(target_modules=LINEAR),
    "fourier": peft.FourierFTConfig(target_modules=LINEAR, n_frequency=50),
    "road": peft.RoadConfig(target_modules=LINEAR),
    "c3a": peft.C3AConfig(target_modules=LINEAR, block_size=16),
    "norms": peft.LNTuningConfig(),
}


def written(model) -> None:
    """Change what trains, as training would."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=random)


def of_adapter(model, config) -> dict[str, torch.Tensor]:
    """The logits through an adapter's life, on a model that may be packed."""
    before = logits(model)
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(config)).eval()
    found = {"before": before, "fresh": logits(model)}
    written(model)
    found["trained"] = logits(model)
    with model.disable_adapter():
        found["disabled"] = logits(model)
    model.merge_adapter()
    found["merged"] = logits(model)
    model.unmerge_adapter()
    found["unmerged"] = logits(model)
    return found | {"unloaded": logits(model.merge_and_unload())}


@pytest.mark.untraced
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("kind", TUNERS)
def test_every_tuner_does_as_on_the_dense_model(delta, kind, family):
    """HRA, SHiRA, trainable tokens read the layer's weight, others write to it when they merge."""
    repo = delta(family)
    dense = of_adapter(repo.pair.load(repo.folder).dequantize(), TUNERS[kind])
    packed = of_adapter(repo.pair.load(repo.folder), TUNERS[kind])
    assert relative(dense["trained"], dense["before"]) > 1e-4
    for state, expected in dense.items():
        assert relative(packed[state], expected) < 1e-5, state


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_adapters_on_experts_parameters(delta, leaf):
    """Parametrized by peft, which reads the base's part: what it adds comes beside the delta."""
    repo, config = delta("mixtral"), LoraConfig(r=2, target_modules=[])
    config.target_parameters = [f"mlp.experts.{leaf}"]
    dense = of_adapter(repo.pair.load(repo.folder).dequantize(), config)
    packed = of_adapter(repo.pair.load(repo.folder), config)
    assert relative(dense["trained"], dense["before"]) > 1e-4
    for state, expected in dense.items():
        assert relative(packed[state], expected) < 1e-5, state


def test_glora_refuses_by_itself(delta):
    config = peft.GloraConfig(target_modules=LINEAR)
    with pytest.raises(ValueError, match=r"is not a plain torch\.nn\.Linear"):
        get_peft_model(delta("llama").pair.load(delta("llama").folder), config)


@pytest.mark.untraced
@pytest.mark.parametrize("kind", ["hra", "dora"])
def test_compiled_with_an_adapter_that_reads_weights(delta, kind):
    repo = delta("llama")
    model = get_peft_model(repo.pair.load(repo.folder), copy.deepcopy(TUNERS[kind])).eval()
    written(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hra", "dora", "tokens"])
def test_beside_a_base_an_adapter_reads_the_weight_in_use(delta, kind):
    repo = delta("llama")
    model = repo.pair.load(repo.pair.base)
    model.load_delta(repo.folder, "one")
    base = repo.pair.load(repo.pair.base)
    table = model.get_input_embeddings()
    assert relative(table.weight, repo.pair.load(repo.folder).dequantize().lm_head.weight) > 1
    assert not torch.equal(table.weight, base.get_input_embeddings().weight)
    with model.disable_deltas():
        assert torch.equal(table.weight, base.get_input_embeddings().weight)
    adapted = get_peft_model(model, copy.deepcopy(TUNERS[kind])).eval()
    assert relative(logits(adapted), repo.logits) < 1e-5
    with model.disable_deltas():
        if kind == "hra":  # the others keep the rows or lengths that they began with
            assert relative(logits(adapted), logits(base)) < 1e-5
    with (
        pytest.raises(DeltaMixError, match="cannot differ by row"),
        model.use_deltas([None, "one"]),
    ):
        logits(adapted)
    with pytest.raises(DeltaMixError, match="cannot be changed or copied by itself"):
        adapted.merge_adapter()


@pytest.mark.parametrize(
    ("family", "saved"),
    [("llama", ["lm_head"]), ("llama", ["embed_tokens", "down_proj"]), ("gpt2", ["c_fc"])],
)
def test_modules_to_save_begin_at_the_fine_tunes_weight(delta, tmp_path, family, saved):
    repo = delta(family)
    targets = ["q_proj"] if family == "llama" else ["c_attn"]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")
    found = []
    for dense in (False, True):
        model = repo.pair.load(repo.folder)
        torch.manual_seed(0)
        model = get_peft_model(model.dequantize() if dense else model, copy.deepcopy(config)).eval()
        assert relative(logits(model), repo.logits) < 1e-5
        wanted = [n for n, p in model.named_parameters() if p.requires_grad and "to_save" in n]
        assert wanted and not any("dm_" in name for name in wanted)
        losses = train(model, steps=3)
        assert losses[-1] < losses[0]
        found.append(logits(model))
        model.save_pretrained(tmp_path / str(dense))
    assert relative(*found) < 1e-3
    for folder, expected in zip(("False", "True"), found, strict=True):  # either's adapter
        again = PeftModel.from_pretrained(repo.pair.load(repo.folder), tmp_path / folder)
        assert relative(logits(again), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_packed_factors_are_not_trained(delta, family):
    repo = delta(family)
    model = repo.pair.load(repo.folder)
    for module in (model, model.base_model, next(iter(delta_modules(model).values()))):
        with pytest.raises(DeltaMixError, match=r"packed factors cannot be trained: train an ad"):
            module.requires_grad_(True)
        module.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    head = model.get_output_embeddings()
    head.weight.requires_grad = True  # of the layer alone: it is dense then
    assert head.weight.requires_grad and relative(logits(model), repo.logits) < 1e-5
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("saved", ["lm_head", "norm"])
def test_modules_to_save_beside_a_base(delta, saved):
    repo = delta("llama")
    model = repo.pair.load(repo.pair.base)
    model.load_delta(repo.folder, "one")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[saved])
    with pytest.raises(DeltaMixError, match=r"cannot be copied by itself \(for peft's modules_to"):
        get_peft_model(model, config)


def beside(repo):
    model = repo.pair.load(repo.pair.base)
    model.load_delta(repo.folder, "one")
    return model


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_peft_stores_whole_is_the_fine_tunes(delta, tmp_path, target):
    """An adapter to an embedding or head brings that along: from a packed model, to a dense one."""
    repo = delta("llama")
    makers = {
        "packed": lambda: repo.pair.load(repo.folder),
        "dense": lambda: repo.pair.load(repo.folder).dequantize(),
        "beside": lambda: beside(repo),
    }
    options = {"target_modules": ["q_proj", target], "init_lora_weights": False}
    for name, make in makers.items():
        torch.manual_seed(0)
        adapted = get_peft_model(make(), LoraConfig(**options)).eval()
        expected = logits(adapted)
        adapted.save_pretrained(tmp_path / name)
        for other in ("packed", "dense"):
            again = PeftModel.from_pretrained(makers[other](), tmp_path / name).eval()
            assert relative(logits(again), expected) < 1e-5, (name, other)
    with pytest.raises(DeltaMixError, match="cannot be changed or copied by itself"):
        PeftModel.from_pretrained(makers["beside"](), tmp_path / "dense")


@pytest.mark.parametrize("kind", [peft.HRAConfig, peft.BOFTConfig])
def test_beside_a_base_an_adapter_reads_the_bias_in_use(delta, kind):
    repo = delta("bert")
    options = {"boft_block_size": 4} if kind is peft.BOFTConfig else {"r": 4}
    model = beside(repo)
    adapted = get_peft_model(model, kind(target_modules=["dense"], **options)).eval()
    assert relative(logits(adapted), repo.logits) < 1e-5
    layer = model.base_model.encoder.layer[0].output.dense
    layer = layer.base_layer if hasattr(layer, "base_layer") else layer
    with model.disable_deltas():
        plain = layer.bias
    assert not torch.equal(layer.bias, plain)
    with model.use_deltas(["one", None]), pytest.raises(DeltaMixError, match="cannot differ"):
        layer.bias + 0


def test_a_trained_head_that_was_tied_is_not_dropped(delta, tmp_path):
    repo = delta("gpt2")
    model = repo.pair.load(repo.folder)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["c_fc"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    with pytest.raises(
        DeltaMixError, match=r"lm_head\.weight was tied to transformer\.wte\.weight"
    ):
        adapted.unload().save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kind", [LoraConfig, peft.LoHaConfig, peft.IA3Config])
def test_beside_a_base_an_adapter_is_taken_off_again(delta, kind):
    """peft puts the layer's bias, as others see it, back into the layer."""
    model = beside(delta("bert"))
    expected = logits(model)
    more = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    adapted = get_peft_model(model, kind(target_modules=["query", "dense"], **more))
    adapted.unload()
    assert torch.equal(logits(model), expected)
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    layer.bias, layer.weight = layer.bias, layer.weight
    assert torch.equal(logits(model), expected)
    model.delete_delta("one")
    assert torch.equal(logits(model), logits(delta("bert").pair.load(delta("bert").pair.base)))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_a_delta_are_not_replaced_beside_a_base(delta, tmp_path, bias):
    config = {"target_modules": ["query", "dense"], "bias": bias}
    if bias == "lora_only":
        with pytest.raises(DeltaMixError, match="cannot be changed or copied"):
            get_peft_model(beside(delta("bert")), LoraConfig(**config))
    alone = get_peft_model(delta("bert").pair.load(delta("bert").folder), LoraConfig(**config))
    alone(**inputs_of(alone.base_model.model, token_ids())).logits.sum().backward()
    trained = [p for p in alone.parameters() if p.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    written(alone)
    alone.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeltaMixError, match=r"cannot be changed or copied|is to be replaced"):
        PeftModel.from_pretrained(beside(delta("bert")), tmp_path / "adapter")
