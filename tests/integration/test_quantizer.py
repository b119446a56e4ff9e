"""The contract of a transformers quantization backend, architecture by architecture."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from tiny_pairs import (
    FAMILIES,
    fine_tune,
    generated,
    inputs_of,
    logits,
    make_config,
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
from deltamix_hf.checkpoint.base import BaseCheckpoint, resolve_base
from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.storage.names import is_guard

# Dense and packed differ by one rounding of base + delta in float32, through a few layers.
DENSE_TOLERANCE = 1e-5
VARIANTS = [
    *((name, "delta-come", False) for name in FAMILIES),
    ("llama", "delta-come", True),
    ("llama", "deltamix", False),
    ("bert", "deltamix", False),
    *((name, "deltamix", True) for name in ("llama", "llama_tied", "bert", "t5")),
    *((name, "deltamix-kl", False) for name in ("llama", "llama_tied")),
    *((name, "deltamix-kl", True) for name in ("bert", "t5", "gpt2")),
]
each_variant = pytest.mark.parametrize(("name", "method", "calibrated"), VARIANTS)
each_family = pytest.mark.parametrize("name", FAMILIES)
# every architecture with zero points, and both kinds of ties with the Gaussian codebook
GAUSSIAN = [("llama", "deltamix-kl"), ("llama_tied", "deltamix-kl")]
each_repo = pytest.mark.parametrize(
    ("name", "method"), [*((name, "delta-come") for name in FAMILIES), *GAUSSIAN]
)
each_method = pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])


def packed_tensors(model) -> dict[str, torch.Tensor]:
    return {k: t for k, t in model.state_dict().items() if ".dm_" in k}


@each_variant
def test_reload_gives_bit_equal_logits(delta, name, method, calibrated):
    repo = delta(name, method, calibrated)
    again = repo.pair.load(repo.folder)
    assert torch.equal(logits(again), repo.logits)
    assert torch.equal(logits(again, token_ids(3, 31, seed=2)), repo.more_logits)
    packed = delta_modules(again).values()
    assert len({id(m.dm_v) for m in packed}) == len(repo.errors)
    if method == "deltamix-kl":  # a global allocation may leave a matrix out
        assert 0 < len(repo.errors) <= repo.pair.family.packed
    else:
        assert len(repo.errors) == repo.pair.family.packed
    assert all(hasattr(m, "dm_zeros") == (method != "deltamix-kl") for m in packed)


@each_variant
def test_delta_is_close_to_the_fine_tune(delta, name, method, calibrated):
    repo = delta(name, method, calibrated)
    base = logits(repo.pair.load(repo.pair.base))
    lost = relative(repo.logits, repo.pair.logits)
    assert 0 < lost < 0.15
    if name != "bert_from_headless":  # its base has a random head
        assert lost < 0.5 * relative(base, repo.pair.logits)


@each_variant
def test_bytes_on_disk_are_the_promised_ones(delta, name, method, calibrated):
    repo = delta(name, method, calibrated)
    size = weight_bytes(repo.folder)
    assert size <= repo.budget
    left_out = repo.pair.family.packed - len(repo.errors)
    assert size >= 0.97 * repo.budget - 450 * left_out  # what their headers would have taken


@each_repo
def test_nothing_of_the_base_is_stored(delta, name, method):
    repo = delta(name, method)
    stored = load_file(repo.folder / "model.safetensors")
    base = load_file(repo.pair.base / "model.safetensors")

    def content(tensor):
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tuple(tensor.shape), raw

    by_content = {content(tensor) for tensor in base.values()}
    model = repo.pair.load(repo.pair.base)
    reader = BaseCheckpoint(resolve_base(str(repo.pair.base), None, {})[0], model)
    for key, tensor in stored.items():
        if is_guard(key):
            continue
        assert content(tensor) not in by_content
        assert key not in reader or not torch.equal(tensor.float(), reader.read(key).float())
    assert {file.name for file in repo.folder.iterdir()} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@each_repo
def test_saving_again_gives_identical_files(delta, tmp_path, name, method):
    repo = delta(name, method)
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "again")
    for file in repo.folder.iterdir():
        if file.suffix == ".safetensors":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    one, two = (
        json.loads((f / "config.json").read_text()) for f in (repo.folder, tmp_path / "again")
    )
    assert one == two


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].generates])
def test_generate_is_equal_after_reload(delta, name):
    repo = delta(name)
    compressed = repo.pair.compress(method="delta-come")
    expected = generated(compressed)
    assert torch.equal(generated(repo.pair.load(repo.folder)), expected)
    assert expected.shape[1] > 2


@each_repo
def test_dense_again(delta, tmp_path, name, method):
    """`dequantize()` and `dequantize=True` give a plain model that saves and loads without us."""
    repo = delta(name, method)
    by_method = repo.pair.load(repo.folder)
    by_method.dequantize()
    by_option = repo.pair.load(repo.folder, quantization_config=DeltaMixConfig(dequantize=True))
    for model in (by_method, by_option):
        assert not delta_modules(model) and not packed_tensors(model)
        assert not hasattr(model.config, "quantization_config")
        assert not hasattr(model, "hf_quantizer")
        assert relative(logits(model), repo.logits) < DENSE_TOLERANCE
    assert torch.equal(logits(by_method), logits(by_option))
    by_method.save_pretrained(tmp_path / "dense")
    plain = repo.pair.load(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(plain), logits(by_method))
    types = {k: type(m) for k, m in repo.pair.load(repo.pair.tuned).named_modules()}
    assert {k: type(m) for k, m in by_method.named_modules()} == types


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


@each_repo
def test_headless_class_gives_the_headless_part(delta, name, method):
    repo = delta(name, method)
    whole = repo.pair.load(repo.folder)
    headless = AutoModel.from_pretrained(repo.folder)
    inner = whole if name == "t5" else whole.base_model
    if name == "t5":  # T5Model is an encoder and a decoder too; compare before the head
        with torch.no_grad():
            expected = whole(**inputs_of(whole), output_hidden_states=True).decoder_hidden_states[
                -1
            ]
    else:
        expected = logits(inner)
    assert torch.equal(logits(headless), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_head_is_initialised_the_rest_is_the_delta(delta, name):
    repo = delta(name)
    model = AutoModelForSequenceClassification.from_pretrained(repo.folder, num_labels=3)
    expected = logits(AutoModel.from_pretrained(repo.folder))
    assert torch.equal(logits(model.base_model), expected)
    assert logits(model).shape[-1] == 3


def test_headless_model_compresses_too(pair, tmp_path):
    source = pair("llama")
    config = source.config(method="delta-come", ratio=0.3)
    model = AutoModel.from_pretrained(source.tuned, quantization_config=config)
    model.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "delta")), logits(model))


@each_repo
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_the_packed_tensors(delta, name, dtype, method):
    """Loaded in, or cast to, half precision: codes and scales keep every bit."""
    repo = delta(name, method)
    plain = repo.pair.load(repo.folder)
    loaded = repo.pair.load(repo.folder, dtype=dtype)
    cast = repo.pair.load(repo.folder).to(dtype)
    expected = packed_tensors(plain)
    for model in (loaded, cast):
        found = packed_tensors(model)
        assert found.keys() == expected.keys()
        assert all(
            torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in expected.items()
        )
        assert model.dtype == dtype
        assert relative(logits(model).float(), repo.logits) < 0.05
    if name in ("gpt2", "bert"):  # .to() also casts rotary tables, and wo of T5 stays float32
        assert torch.equal(logits(loaded), logits(cast))


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
OFFLOADS = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "t5": {"shared": "disk", "encoder": "disk", "decoder": "disk", "lm_head": "disk"},
    "llama_tied": {
        "model.embed_tokens": "disk",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "gpt2": {
        "transformer.wte": "disk",
        "transformer.wpe": "disk",
        "transformer.drop": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
        "transformer.ln_f": "cpu",
        "lm_head": "disk",
    },
    "bert_from_headless": {
        "bert.embeddings": "cpu",
        "bert.encoder.layer.0": "disk",
        "bert.encoder.layer.1": "cpu",
        "cls": "cpu",
    },
}


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "delta-come") for name in OFFLOADS), *GAUSSIAN]
)
def test_disk_offload(delta, tmp_path, name, method):
    repo = delta(name, method)
    model = repo.pair.load(repo.folder, device_map=OFFLOADS[name], offload_folder=tmp_path / "off")
    assert any(p.device.type == "meta" for p in model.parameters())
    torch.testing.assert_close(logits(model), repo.logits, **ALONE)


def test_offloaded_model_says_it_cannot_be_saved_or_merged(delta, tmp_path):
    repo = delta("llama")
    options = {"device_map": OFFLOADS["llama"], "offload_folder": tmp_path / "off"}
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
            device_map=OFFLOADS["llama"],
            offload_folder=tmp_path / "off",
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
