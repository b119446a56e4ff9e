"""What a quantization backend of transformers is asked for, beside `test_contract.py`."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from tiny_pairs import (
    fine_tune,
    generated,
    logits,
    make_config,
    parts_on_disk,
    quick,
    relative,
    token_ids,
    weight_bytes,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    WavLMConfig,
    WavLMModel,
)

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.nn.layers import delta_modules

# Dense and packed differ by one rounding of base + delta in float32, through a few layers.
DENSE_TOLERANCE = 1e-5
each_method = pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "t5"])
def test_dense_models_can_be_resized(delta, name):
    repo = delta(name)
    model = repo.pair.load(repo.folder)
    model.dequantize()
    before = logits(model)
    model.tie_weights()
    model.resize_token_embeddings(300)
    assert torch.equal(logits(model)[..., :256], before)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_packed_embeddings_refuse_to_be_resized(delta, name):
    """transformers would make plain modules of them, without the delta."""
    repo = delta(name)
    model = repo.pair.load(repo.folder)
    with pytest.raises(DeltaMixError, match="cannot be resized"):
        model.resize_token_embeddings(300)
    model.resize_token_embeddings(256)
    assert torch.equal(logits(model), repo.logits)


def test_dense_under_the_hooks_of_accelerate(delta):
    """Hooks keep the forward they found; after dequantize() it must be the plain one."""
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(logits(model), repo.logits)
    model.dequantize()
    assert relative(logits(model), repo.logits) < DENSE_TOLERANCE


def test_dense_after_saving(delta, tmp_path):
    """save_pretrained leaves config.dtype a string; dequantize must still work."""
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    model.save_pretrained(tmp_path / "again")
    model.dequantize()
    assert relative(logits(model), repo.logits) < DENSE_TOLERANCE


def test_dense_in_another_dtype(delta):
    repo = delta("llama_tied")
    model = repo.pair.load(repo.folder)
    model.dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative(logits(model), repo.logits) < 0.05


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_head_is_initialised_the_rest_is_the_delta(delta, name):
    repo = delta(name)
    model = AutoModelForSequenceClassification.from_pretrained(repo.folder, num_labels=3)
    expected = logits(AutoModel.from_pretrained(repo.folder))
    assert torch.equal(logits(model.base_model), expected)
    assert logits(model).shape[-1] == 3


@pytest.mark.parametrize("name, refusal", [("llama", "was it resized"), ("bert", "do not fit")])
@pytest.mark.parametrize("ignore", [False, True])
def test_other_sizes_than_the_delta_s_are_refused(delta, name, refusal, ignore):
    repo, options = delta(name), {"ignore_mismatched_sizes": ignore}
    with pytest.raises(DeltaMixError, match=refusal):
        repo.pair.family.auto.from_pretrained(repo.folder, vocab_size=200, **options)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_a_class_without_what_the_delta_changes_is_not_saved(delta, tmp_path, cls):
    repo = delta("llama")
    model = cls.from_pretrained(repo.folder)
    with pytest.raises(DeltaMixError, match="lacks lm_head, which the delta changes"):
        model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "dense")), logits(model))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dense_model_trains_as_a_plain_one(delta, name, early):
    repo = delta(name)
    config = {"quantization_config": DeltaMixConfig(dequantize=True)} if early else {}
    model = repo.pair.load(repo.folder, **config)
    model = model if early else model.dequantize()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_parameters_are_the_fine_tunes(delta, name):
    repo = delta(name)
    model, tuned = repo.pair.load(repo.folder), repo.pair.load(repo.pair.tuned)
    assert model.num_parameters() == tuned.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == tuned.num_parameters(False, True)
    assert model.num_parameters(only_trainable=True) == 0


def test_headless_model_compresses_too(pair, tmp_path):
    source = pair("llama")
    config = source.config(method="delta-come", ratio=0.3)
    model = AutoModel.from_pretrained(source.tuned, quantization_config=config)
    model.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "delta")), logits(model))


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama_tied", "delta-come"), ("t5", "delta-come"), ("llama_tied", "deltamix-kl")],
)
def test_half_precision_repo_round_trip(delta, tmp_path, name, method):
    repo = delta(name, method)
    model = repo.pair.load(repo.folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    again = repo.pair.load(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "t5"])
def test_ties_share_one_delta(delta, name):
    repo = delta(name)
    model = repo.pair.load(repo.folder)
    for target, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)
    tied = (
        model.lm_head
        if name == "llama_tied"
        else model.get_submodule("shared")
        if name == "t5"
        else None
    )
    if tied is not None:
        assert tied.dm_v is model.get_input_embeddings().dm_v
        names = load_file(repo.folder / "model.safetensors").keys()
        assert sum(name.endswith(".dm_v") for name in names) == repo.pair.family.packed


def test_nothing_is_trainable(delta):
    model = delta("llama").pair.load(delta("llama").folder)
    assert not any(p.requires_grad for p in model.parameters())


@each_method
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_gradient_through_the_model_is_the_dense_one(delta, name, method):
    repo = delta(name, method)
    packed, dense = repo.pair.load(repo.folder), repo.pair.load(repo.folder)
    dense.dequantize()
    gradients = []
    for model in (packed, dense):
        torch.manual_seed(3)
        x = torch.randn(2, 9, 64, requires_grad=True)
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    assert relative(*gradients) < 1e-4


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("backend", "method"),
    [("eager", "delta-come"), ("aot_eager", "delta-come"), ("aot_eager", "deltamix-kl")],
)
def test_compiles_in_one_graph(delta, backend, method):
    repo = delta("llama_tied", method)
    model = repo.pair.load(repo.folder)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(found, repo.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.untraced
def test_a_static_cache_and_a_compiled_decode_write_the_same(delta):
    repo = delta("llama_tied", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    written = generated(model)
    assert torch.equal(generated(model, cache_implementation="static"), written)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(generated(model, cache_implementation="static"), written)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Folders of a base and a fine-tune of twelve experts, which transformers fuses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=256, num_hidden_layers=1, num_key_value_heads=4, num_local_experts=12, **sizes
    )
    folder = tmp_path_factory.mktemp("mixtral")
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(folder / "base")
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    return folder


@each_method
def test_fused_experts_kept_whole_reload(mixtral, tmp_path, method):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    options = {"method": method, "modules_to_not_convert": ["experts"], **quick(method)}
    config = make_config(mixtral / "base", budget_bytes=400_000, **options)
    load = MixtralForCausalLM.from_pretrained
    model, tuned = load(mixtral / "tuned", quantization_config=config), load(mixtral / "tuned")
    model.save_pretrained(tmp_path / "delta")
    again = load(tmp_path / "delta")
    whole = tuned.get_parameter(name)
    whole = whole.bfloat16().float() if method == "deltamix-kl" else whole
    assert torch.equal(again.get_parameter(name), whole)
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    # not bit-equal: grouped products depend on where the memory lies
    assert relative(logits(again), logits(model)) < 1e-6
    assert weight_bytes(tmp_path / "delta") <= 400_000


@each_method
def test_experts_that_equal_the_base_are_read_from_it(mixtral, tmp_path, method):
    """The base's keys, fused on the way, not a copy of them."""
    load = MixtralForCausalLM.from_pretrained
    model, base = load(mixtral / "tuned"), load(mixtral / "base").state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.copy_(base[name])
    model.save_pretrained(tmp_path / "tuned")
    options = {"method": method, **quick(method)}
    config = make_config(mixtral / "base", ratio=0.3, **options)
    packed = load(tmp_path / "tuned", quantization_config=config)
    packed.save_pretrained(tmp_path / "delta")
    assert not any(
        "experts" in name for name in load_file(tmp_path / "delta" / "model.safetensors")
    )
    again = load(tmp_path / "delta")
    one, two = packed.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_weights_read_directly_are_not_packed(tmp_path):
    """WavLM's attention hands `q_proj.weight` to a function, past the forward of the module."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    audio = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    audio |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    config = WavLMConfig(num_hidden_layers=1, num_conv_pos_embedding_groups=4, **sizes, **audio)
    model = WavLMModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    fine_tune(model, size=0.3)
    model.save_pretrained(tmp_path / "tuned")
    config = DeltaMixConfig(tmp_path / "base", budget_bytes=800_000, method="delta-come")
    model = WavLMModel.from_pretrained(tmp_path / "tuned", quantization_config=config)
    sound = torch.randn(1, 2000)
    with torch.no_grad():
        packed = model(sound)[0]
        model.dequantize()
        assert relative(packed, model(sound)[0]) < DENSE_TOLERANCE


# Where the weights go


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_device_maps_on_the_cpu(delta, tmp_path, name, device_map):
    repo = delta(name)
    model = repo.pair.load(repo.folder, device_map=device_map)
    assert torch.equal(logits(model), repo.logits)
    model.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (repo.folder / name).read_bytes()


# Layers that are not all here do not look their codes up together: other orders of additions.
ALONE = {"rtol": 1e-5, "atol": 1e-5}


def test_offloaded_model_says_it_cannot_be_saved_or_merged(delta, tmp_path):
    repo = delta("llama")
    options = parts_on_disk(repo.pair, "cpu", tmp_path / "off")
    model = repo.pair.load(repo.folder, **options)
    with pytest.raises(DeltaMixError, match="offload"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(DeltaMixError, match="offload"):
        model.dequantize()
    torch.testing.assert_close(logits(model), repo.logits, **ALONE)
    dense = DeltaMixConfig(dequantize=True)
    with pytest.raises(DeltaMixError, match="offload"):
        repo.pair.load(repo.folder, quantization_config=dense, **options)


def test_compressing_with_offload_is_refused(pair, tmp_path):
    source = pair("llama")
    with pytest.raises(DeltaMixError, match="one device"):
        source.load(
            source.tuned,
            quantization_config=source.config(),
            **parts_on_disk(source, "cpu", tmp_path / "off"),
        )


@pytest.mark.parametrize(
    ("device_map", "method"),
    [("cpu", "delta-come"), ("auto", "delta-come"), ("auto", "deltamix-kl")],
)
def test_compressing_with_a_device_map(pair, delta, device_map, method):
    source = pair("llama")
    config = source.config(method=method, **quick(method))
    model = source.load(source.tuned, quantization_config=config, device_map=device_map)
    assert torch.equal(logits(model), delta("llama", method).logits)


# What a user may give again at load


def test_base_that_moved(delta, copied):
    repo = delta("llama")
    base, folder = copied(repo.pair.base), copied(repo.folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"] = "/nowhere"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError, match="/nowhere"):
        repo.pair.load(folder)
    moved = repo.pair.load(folder, quantization_config=DeltaMixConfig(base_model=base))
    assert torch.equal(logits(moved), repo.logits)
    moved.save_pretrained(folder)  # remembers where the base is now
    assert torch.equal(logits(repo.pair.load(folder)), repo.logits)


@each_method
@pytest.mark.parametrize("given", [{}, {"method": "deltamix", "codebook": "gaussian"}])
def test_other_options_at_load_do_not_change_the_repo(delta, method, given):
    """Those of a default config among them: what the files hold decides."""
    repo = delta("llama", method)
    options = make_config(ratio=0.5, group_size=32, bits=(4,), **given)
    model = repo.pair.load(repo.folder, quantization_config=options)
    assert torch.equal(logits(model), repo.logits)
    config = model.config.quantization_config
    stored = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert config.to_dict() == stored
    assert (config.method.name, config.ratio) == (method, 0.2)
    assert config.method.group_size == (128 if method == "delta-come" else 0)


def test_repos_of_format_1_still_load(delta, copied):
    """They name no codebook and none of the later switches; all are on the min-max grid."""
    repo = delta("llama")
    folder = copied(repo.folder)
    config = json.loads((folder / "config.json").read_text())
    known = {
        *("quant_method", "base_model", "method", "ratio", "bits", "group_size", "calibration"),
        *("num_samples", "seq_length", "seed", "modules_to_not_convert", "dequantize"),
        *("base_revision", "f_max", "calibration_source", "base_fingerprints", "errors"),
    }
    stored = config["quantization_config"]
    config["quantization_config"] = {k: v for k, v in stored.items() if k in known}
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    again = repo.pair.load(folder)
    assert torch.equal(logits(again), repo.logits)
    assert again.config.quantization_config.method.codebook == "min-max"
    again.save_pretrained(folder)  # and can be saved again
    assert torch.equal(logits(repo.pair.load(folder)), repo.logits)


def test_base_kwargs_reach_the_base_and_no_file(pair, tmp_path):
    """The base in a subfolder, which only base_kwargs can say."""
    source = pair("llama")
    source.load(source.base).save_pretrained(tmp_path / "repo" / "inner")
    config = DeltaMixConfig(
        tmp_path / "repo", ratio=0.2, method="delta-come", base_kwargs={"subfolder": "inner"}
    )
    model = source.load(source.tuned, quantization_config=config)
    model.save_pretrained(tmp_path / "delta")
    assert "inner" not in (tmp_path / "delta" / "config.json").read_text()
    with pytest.raises(DeltaMixError, match="cannot find the base"):
        source.load(tmp_path / "delta")
    again = source.load(
        tmp_path / "delta", quantization_config=DeltaMixConfig(base_kwargs={"subfolder": "inner"})
    )
    assert torch.equal(logits(again), logits(model))


def test_sharded_base_and_sharded_fine_tune(pair, tmp_path, delta):
    source = pair("llama")
    for kind, folder in (("base", source.base), ("tuned", source.tuned)):
        source.load(folder).save_pretrained(tmp_path / kind, max_shard_size="60KB")
    config = DeltaMixConfig(tmp_path / "base", ratio=0.2, method="delta-come")
    model = source.load(tmp_path / "tuned", quantization_config=config)
    assert torch.equal(logits(model), delta("llama").logits)
    model.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(model))


@each_method
def test_hooks_and_forward_of_the_plain_model_survive(pair, method):
    """Modules are changed in place: the same objects, in the same places, under the same names."""
    source = pair("llama")
    model = source.compress(method=method, **quick(method))
    names = [name for name, _ in source.load(source.tuned).named_modules()]
    assert [name for name, _ in model.named_modules()] == names
    assert all(isinstance(m, nn.Linear | nn.Embedding) for m in delta_modules(model).values())
    for name, module in model.named_modules():  # measuring and tuning leave nothing behind
        assert "forward" not in vars(module), name
        assert not module._forward_hooks and not module._forward_pre_hooks, name
