"""The base checkpoint: found, refused, and read as transformers itself would load it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pairs import FAMILIES
from transformers import AutoModel, MixtralConfig, MixtralForCausalLM

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.base import WEIGHTS, BaseCheckpoint, resolve_base, same


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A mixture of 12 experts, whose checkpoint keys transformers fuses into 3-d parameters.

    More than ten, so that experts.10 must not be taken for the second one.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=12,
    )
    folder = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def assert_reads_like_transformers(folder, model):
    """Every parameter that transformers loads from `folder` equals what the reader gives."""
    files, commit = resolve_base(str(folder), None, {})
    assert commit is None
    base = BaseCheckpoint(files, model)
    tied = set(model.all_tied_weights_keys)
    found = [name for name in model.state_dict() if name not in tied and name in base]
    for name in found:
        value = base.read(name)
        assert torch.equal(value, model.state_dict()[name]), name
        assert same(model.state_dict()[name], value)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_transformers_loads(pair, name):
    source = pair(name)
    model = source.load(source.base)
    found = assert_reads_like_transformers(source.base, model)
    keys = sum(len(safe_open(f, "pt").keys()) for f in source.base.glob("*.safetensors"))
    # of a base saved without a head, its pooler has no place in the model
    unused = 2 if name == "bert_from_headless" else 0
    assert len(found) == keys - unused


def test_reads_a_sharded_base(pair, tmp_path):
    source = pair("llama")
    source.load(source.base).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_reads_like_transformers(tmp_path, source.load(source.base))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_reads_for_a_headless_model(pair, name):
    source = pair(name)
    assert assert_reads_like_transformers(source.base, AutoModel.from_pretrained(source.base))


def test_reads_fused_experts(mixtral):
    model = MixtralForCausalLM.from_pretrained(mixtral)
    found = assert_reads_like_transformers(mixtral, model)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert fused in found
    base = BaseCheckpoint(resolve_base(str(mixtral), None, {})[0], model)
    assert not base.is_plain(fused) and len(base.checkpoint_keys(fused)) == 24
    assert base.is_plain("model.embed_tokens.weight")


def test_unknown_names(pair):
    source = pair("llama")
    model = source.load(source.base)
    base = BaseCheckpoint(resolve_base(str(source.base), None, {})[0], model)
    assert "model.layers.7.mlp.up_proj.weight" not in base
    with pytest.raises(DeltaMixError, match=r"layers\.7"):
        base.read("model.layers.7.mlp.up_proj.weight")


def test_hidden_keys_are_other_names_of_what_the_delta_supplies(pair):
    source = pair("bert_from_headless")
    model = source.load(source.tuned)
    base = BaseCheckpoint(resolve_base(str(source.base), None, {})[0], model)
    name = "bert.embeddings.LayerNorm.weight"
    assert base.hidden_keys([name, "cls.predictions.bias"]) == {name.removeprefix("bert.")}
    # the same name on both sides needs no hiding: the last copy wins
    plain = pair("bert")
    base = BaseCheckpoint(resolve_base(str(plain.base), None, {})[0], model)
    assert base.hidden_keys([name]) == set()


def test_same_is_equality_after_the_cast():
    base = torch.tensor([1.0, 1.0 + 2**-12])
    assert same(base.to(torch.bfloat16), base)
    assert same(base.clone(), base)
    assert not same(base + 2**-20, base)
    assert not same(base[:1], base)
    assert not same(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("base_model", [None, ""])
def test_no_base_given(base_model):
    with pytest.raises(DeltaMixError, match="no base model given"):
        resolve_base(base_model, None, {})


@pytest.mark.parametrize("missing", ["folder", "config.json", WEIGHTS])
def test_base_not_found(pair, tmp_path, missing):
    folder = tmp_path / "base"
    if missing != "folder":
        shutil.copytree(pair("llama").base, folder)
        (folder / missing).unlink()
    with pytest.raises(DeltaMixError) as error:
        resolve_base(str(folder), None, {})
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert "DeltaMixConfig(base_model=..." in str(error.value)


def test_base_on_the_hub_not_found_offline():
    with pytest.raises(DeltaMixError, match="someone/no-such-base"):
        resolve_base("someone/no-such-base", "v1", {"local_files_only": True})


def test_base_with_pickled_weights_only(pair, tmp_path):
    shutil.copytree(pair("llama").base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / WEIGHTS)
    (tmp_path / "base" / WEIGHTS).unlink()
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(DeltaMixError, match=r"model\.safetensors"):
        resolve_base(str(tmp_path / "base"), None, {})


def test_missing_shard(pair, tmp_path):
    source = pair("llama")
    source.load(source.base).save_pretrained(tmp_path, max_shard_size="60KB")
    model = source.load(source.base)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DeltaMixError, match=shard.name):
        BaseCheckpoint(resolve_base(str(tmp_path), None, {})[0], model)


def test_quantized_base_is_refused(pair, tmp_path):
    shutil.copytree(pair("llama").base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError, match=r"itself quantized \(bitsandbytes\)"):
        resolve_base(str(tmp_path / "base"), None, {})


def test_unreadable_config_of_the_base(pair, tmp_path):
    shutil.copytree(pair("llama").base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{not json")
    with pytest.raises(DeltaMixError, match=r"config\.json"):
        resolve_base(str(tmp_path / "base"), None, {})


def test_damaged_base_file(pair, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(pair("llama").base, folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    model = pair("llama").load(pair("llama").base)
    with pytest.raises(DeltaMixError, match=WEIGHTS):
        BaseCheckpoint(resolve_base(str(folder), None, {})[0], model)


def test_scalar_tensors_of_the_base_are_read(pair, tmp_path):
    """A 0-d tensor has no first row, but is read and compared like any other."""
    save_file({"scale": torch.tensor(2.0)}, tmp_path / WEIGHTS)
    base = BaseCheckpoint([str(tmp_path / WEIGHTS)], pair("llama").load(pair("llama").base))
    assert base.infos["scale"].read().item() == 2.0
