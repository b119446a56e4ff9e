"""A whole fine-tune against its base: what is packed, what is stored whole, what is recorded."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compress import true_error
from tiny_pairs import (
    FAMILIES,
    calibration_ids,
    fine_tune,
    logits,
    make_tokenizer,
    text_of,
    token_ids,
    weight_bytes,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.base import BaseCheckpoint, resolve_base
from deltamix_hf.calibration import input_grams
from deltamix_hf.compress_model import sort_tensors
from deltamix_hf.format import is_guard
from deltamix_hf.modules import delta_modules


def stored_modules(model) -> dict:
    """Packed modules, tied twins left out: what the files hold."""
    tied = set(model.all_tied_weights_keys)
    return {k: m for k, m in delta_modules(model).items() if f"{k}.weight" not in tied}


def packed_tensors(model) -> dict[str, torch.Tensor]:
    return {k: t for k, t in model.state_dict().items() if ".dm_" in k}


def assert_same_packed(one, two):
    left, right = packed_tensors(one), packed_tensors(two)
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_goes_where_it_belongs(pair, name):
    source = pair(name)
    model = source.load(source.tuned)
    base = BaseCheckpoint(resolve_base(str(source.base), None, {})[0], model)
    targets, overlay = sort_tensors(model, base, [])
    tied = set(model.all_tied_weights_keys)
    names = {f"{module}.weight" for module in targets} | overlay.keys()
    buffers = {n for n, _ in model.named_buffers()}
    assert names - buffers == model.state_dict().keys() - tied - buffers
    assert len(targets) == source.family.packed
    if name in ("llama", "llama_tied", "qwen3", "bert", "t5"):  # nn.Linear and nn.Embedding only
        assert all(t.ndim < 2 or t.numel() < 4096 for t in overlay.values())


def test_what_equals_the_base_is_not_stored(pair, tmp_path):
    source = pair("llama")
    stored = load_file(source.tuned / "model.safetensors")
    original = load_file(source.base / "model.safetensors")
    untouched = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    shutil.copytree(source.tuned, tmp_path / "tuned")
    mixed = {**stored, **{name: original[name] for name in untouched}}
    save_file(mixed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "tuned", quantization_config=source.config(method="delta-come", ratio=0.3)
    )
    assert "model.layers.0.mlp.up_proj" not in delta_modules(model)
    assert len(delta_modules(model)) == source.family.packed - 1
    model.save_pretrained(tmp_path / "delta")
    names = load_file(tmp_path / "delta" / "model.safetensors").keys()
    assert not any(name.startswith("model.layers.0.mlp.up_proj") for name in names)
    assert "model.norm.weight" not in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("name", "method", "calibrated"),
    [
        *((name, "delta-come", False) for name in FAMILIES),
        *((name, "delta-come", True) for name in ("llama", "gpt2")),
        *((name, "deltamix", False) for name in ("llama", "bert")),
        *((name, "deltamix", True) for name in ("llama", "llama_tied", "bert", "t5")),
    ],
)
def test_recorded_errors_are_those_of_the_files(delta, name, method, calibrated):
    """tr((Δ−D) C (Δ−D)ᵀ) / tr(Δ C Δᵀ), D decoded from the reloaded repo."""
    repo = delta(name, method, calibrated)
    source = repo.pair
    tuned, plain, packed = (source.load(f) for f in (source.tuned, source.base, repo.folder))
    modules = stored_modules(packed)
    assert repo.errors.keys() == modules.keys()
    assert packed.config.quantization_config.errors == repo.errors
    grams = {}
    if calibrated:
        # where a tied embedding is used as a matrix: by lm_head
        users = {n: n for n in modules if isinstance(tuned.get_submodule(n), nn.Linear)}
        for target, origin in tuned.all_tied_weights_keys.items():
            twin = target.rpartition(".")[0]
            if target.endswith("weight") and isinstance(tuned.get_submodule(twin), nn.Linear):
                users[origin.rpartition(".")[0]] = twin
        observed = {n: tuned.get_submodule(user) for n, user in users.items() if n in modules}
        grams = input_grams(tuned, observed, [calibration_ids()])
    for module_name, module in modules.items():
        original = plain.state_dict()[f"{module_name}.weight"]
        change = tuned.state_dict()[f"{module_name}.weight"] - original
        assert torch.equal(module.weight, original)
        expected = true_error(change, module.packed().dense(), grams.get(module_name))
        assert repo.errors[module_name] == pytest.approx(expected, rel=1e-5), module_name
        assert 0 < expected < 0.9


def test_records_in_the_config(delta):
    for calibrated in (False, True):
        repo = delta("llama", calibrated=calibrated)
        stored = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == "deltamix" and stored["format_version"] == 1
        assert stored["base_model"] == str(repo.pair.base)
        keys = load_file(repo.pair.base / "model.safetensors").keys()
        assert stored["base_fingerprints"].keys() == keys
        source = "token ids [8, 32]" if calibrated else "data-free"
        assert stored["calibration_source"] == source
        assert "calibration" not in stored and "base_kwargs" not in stored


@pytest.mark.parametrize("load", [AutoModelForCausalLM, LlamaForCausalLM])
def test_the_callers_config_is_left_alone(pair, tmp_path, load):
    """One config object for two fine-tunes: neither sees the other's records."""
    source = pair("llama")
    config = source.config(method="delta-come", calibration=calibration_ids(), ratio=0.3)
    before = copy.deepcopy(config)
    one = load.from_pretrained(source.tuned, quantization_config=config)
    first = dict(one.config.quantization_config.errors)
    other = load.from_pretrained(source.base)
    fine_tune(other, seed=5)
    other.lm_head.weight.data.copy_(load.from_pretrained(source.base).lm_head.weight.data)
    other.save_pretrained(tmp_path / "other")
    two = load.from_pretrained(tmp_path / "other", quantization_config=config)
    assert "lm_head" in first and "lm_head" not in two.config.quantization_config.errors
    assert one.config.quantization_config.errors == first
    assert config.to_dict() == before.to_dict()
    assert torch.equal(config.calibration, before.calibration)


def test_identical_fine_tune_warns_and_is_almost_empty(pair, tmp_path):
    source = pair("llama")
    with pytest.warns(UserWarning, match="identical to its base"):
        model = source.load(source.base, quantization_config=source.config(calibration=["x"]))
    model.save_pretrained(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert all(is_guard(name) for name in stored)
    assert weight_bytes(tmp_path / "delta") < 400
    again = source.load(tmp_path / "delta")
    assert torch.equal(logits(again), logits(source.load(source.base)))


def test_modules_to_not_convert_are_stored_whole(pair, tmp_path):
    source = pair("llama")
    skip = ["lm_head", "model.layers.0", "mlp.down_proj"]
    model = source.compress(
        method="delta-come", ratio=None, budget_bytes=300_000, modules_to_not_convert=skip
    )
    packed = delta_modules(model)
    assert packed and not any(
        n == "lm_head" or n.startswith("model.layers.0.") or n.endswith("down_proj") for n in packed
    )
    tuned = source.load(source.tuned).state_dict()
    assert torch.equal(model.lm_head.weight, tuned["lm_head.weight"])
    model.save_pretrained(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], tuned["lm_head.weight"])
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(model))


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_base_and_fine_tune_in_different_dtypes(pair, tmp_path, base_dtype, tuned_dtype):
    source = pair("llama")
    for kind, folder, dtype in (("b", source.base, base_dtype), ("t", source.tuned, tuned_dtype)):
        source.load(folder, dtype=getattr(torch, dtype)).save_pretrained(tmp_path / kind)
    config = DeltaMixConfig(tmp_path / "b", ratio=0.2, method="delta-come")
    model = source.load(tmp_path / "t", quantization_config=config)
    assert model.dtype == getattr(torch, tuned_dtype)
    model.save_pretrained(tmp_path / "delta")
    again = source.load(tmp_path / "delta")
    assert again.dtype == model.dtype and torch.equal(logits(again), logits(model))


# Calibration by texts


@pytest.fixture(scope="module")
def with_tokenizer(pair, tmp_path_factory):
    """The llama fine-tune with a tokenizer in its folder."""
    folder = tmp_path_factory.mktemp("with_tokenizer") / "tuned"
    shutil.copytree(pair("llama").tuned, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["list", "txt", "jsonl", "data set"])
def test_texts_calibrate_like_their_token_ids(pair, with_tokenizer, tmp_path, kind):
    source = pair("llama")
    text = text_of(token_ids(1, 24)[0])
    calibration = {
        "list": [text, "   "],
        "txt": str(tmp_path / "texts.txt"),
        "jsonl": str(tmp_path / "texts.jsonl"),
        "data set": str(tmp_path / "data"),
    }[kind]
    (tmp_path / "texts.txt").write_text(f"\n{text}\n")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = source.config(method="delta-come", calibration=calibration)
    by_text = source.load(with_tokenizer, quantization_config=config)
    by_ids = source.compress(method="delta-come", calibration=token_ids(1, 24))
    assert_same_packed(by_text, by_ids)
    blind = source.compress(method="delta-come")
    assert by_text.config.quantization_config.errors != blind.config.quantization_config.errors


def test_texts_without_a_tokenizer(pair):
    with pytest.raises(DeltaMixError, match="tokenizer") as error:
        pair("llama").compress(calibration=["w4 w5 w6"])
    assert str(pair("llama").tuned) in str(error.value)


def test_tokenizers_that_give_no_tokens(pair, with_tokenizer, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    config = pair("llama").config(calibration=str(tmp_path / "blank.txt"))
    with pytest.raises(DeltaMixError, match="no tokens"):
        pair("llama").load(with_tokenizer, quantization_config=config)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_longer_than_the_model_has_positions(pair, name):
    """The default seq_length is 2048, these have 128 positions."""
    model = pair(name).compress(method="delta-come", calibration=token_ids(2, 200))
    cut = pair(name).compress(method="delta-come", calibration=token_ids(2, 200)[:, :128])
    assert_same_packed(model, cut)


@pytest.mark.parametrize("bad", [-1, 256])
def test_token_ids_outside_the_vocabulary(pair, bad):
    ids = calibration_ids()
    ids[3, 4] = bad
    with pytest.raises(DeltaMixError, match=r"0 to 255"):
        pair("llama").compress(calibration=ids)
