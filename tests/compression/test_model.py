"""A whole fine-tune against its base: what is packed, what is stored whole, what is recorded."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from matrix_cases import true_error
from safetensors.torch import load_file, save_file
from tiny_pairs import (
    FAMILIES,
    calibration_ids,
    fine_tune,
    logits,
    make_config,
    make_tokenizer,
    quick,
    relative,
    text_of,
    token_ids,
    weight_bytes,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deltamix_hf import DeltaMixError
from deltamix_hf.calibration.statistics import collect, metrics_of
from deltamix_hf.checkpoint import tensor_diff
from deltamix_hf.checkpoint.base import BaseCheckpoint, resolve_base
from deltamix_hf.checkpoint.tensor_diff import sort_tensors
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.compression.job import Job
from deltamix_hf.method import METHODS, SWITCHES
from deltamix_hf.nn.layers import delta_modules, oriented, tied_modules, weight_of
from deltamix_hf.storage.names import is_guard

BOTH = ["delta-come", "deltamix-kl"]  # min-max and Gaussian
each_method = pytest.mark.parametrize("method", BOTH)


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


@each_method
def test_what_equals_the_base_is_not_stored(pair, tmp_path, method):
    source = pair("llama")
    stored = load_file(source.tuned / "model.safetensors")
    original = load_file(source.base / "model.safetensors")
    untouched = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    shutil.copytree(source.tuned, tmp_path / "tuned")
    mixed = {**stored, **{name: original[name] for name in untouched}}
    save_file(mixed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    config = source.config(method=method, ratio=0.3, **quick(method))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", quantization_config=config)
    assert "model.layers.0.mlp.up_proj" not in delta_modules(model)
    if method == "delta-come":  # a global allocation may leave out more
        assert len(delta_modules(model)) == source.family.packed - 1
    model.save_pretrained(tmp_path / "delta")
    names = load_file(tmp_path / "delta" / "model.safetensors").keys()
    assert not any(name.startswith("model.layers.0.mlp.up_proj") for name in names)
    assert "model.norm.weight" not in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(again), logits(model))


ALONE = {"sequential": False, "tune_steps": 0}  # every matrix by itself, against its own delta


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("name", "method", "calibrated"),
    [
        *((name, "delta-come", False) for name in ("llama_tied", "t5")),
        ("gpt2", "delta-come", True),
        ("bert", "deltamix", False),
        *((name, "deltamix", True) for name in ("llama", "llama_tied", "t5")),
        ("bert", "deltamix-kl", False),
        *((name, "deltamix-kl", True) for name in ("llama_tied", "bert", "t5")),
    ],
)
def test_recorded_errors_are_those_of_the_files(delta, name, method, calibrated):
    """tr((Δ−D) C (Δ−D)ᵀ) / tr(Δ C Δᵀ), D decoded from the reloaded repo."""
    alone = calibrated and method == "deltamix-kl"
    repo = delta(name, method, calibrated, **(ALONE if alone else {}))
    source = repo.pair
    tuned, plain, packed = (source.load(f) for f in (source.tuned, source.base, repo.folder))
    modules = stored_modules(packed)
    assert repo.errors.keys() == modules.keys()
    assert packed.config.quantization_config.errors == repo.errors
    inputs = {}
    if calibrated:
        fisher = method == "deltamix-kl"
        uses = {n: tied_modules(tuned, n) for n in modules}
        if not fisher:  # where a tied embedding is used as a matrix: by lm_head
            uses = {
                n: {k: m for k, m in users.items() if not isinstance(m, nn.Embedding)}
                for n, users in uses.items()
            }
        observed = {k: m for users in uses.values() for k, m in users.items()}
        found, scored = collect(tuned, observed, [calibration_ids()], fisher)
        for n, users in uses.items():
            if users:
                known = [found[k] for k in users if k in found]
                inputs[n] = metrics_of(known, scored, prior=METHODS[method].prior).inputs
        assert not fisher or inputs.keys() == modules.keys()
    for module_name, module in modules.items():
        original = plain.state_dict()[f"{module_name}.weight"]
        change = tuned.state_dict()[f"{module_name}.weight"] - original
        assert torch.equal(weight_of(module), original)
        change = oriented(module, change)
        expected = true_error(change, module.packed().dense(), inputs.get(module_name))
        assert repo.errors[module_name] == pytest.approx(expected, rel=1e-5), module_name
        assert 0 < expected < 0.9


@pytest.mark.parametrize(("name", "calibrated"), [("llama", True), ("bert", True)])
def test_matrices_not_worth_their_bytes_are_left_to_the_base(delta, name, calibrated):
    """In all of the default method: the rest of the model makes up for them."""
    repo = delta(name, "deltamix-kl", calibrated)
    model = repo.pair.load(repo.folder)
    base = repo.pair.load(repo.pair.base).state_dict()
    modules = stored_modules(model)
    assert repo.errors.keys() == modules.keys() and 0 < len(modules) <= repo.pair.family.packed
    assert all(0 < error < 1.5 for error in repo.errors.values())  # of a moved target, so above 1
    large = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel() >= 4096
    }
    left_out = {f"{n}.weight" for n in large - delta_modules(model).keys()}
    assert left_out and all("q" in n or "key" in n for n in left_out)  # of uniform attention
    assert all(torch.equal(model.get_parameter(n), base[n]) for n in left_out)


def test_the_default_method_is_deterministic(pair, delta):
    """Random tokens, draws of the Fisher information, tuning: all by the seed of the config."""
    repo = delta("llama", "deltamix-kl")
    torch.manual_seed(99)
    again = pair("llama").compress(**quick("deltamix-kl"))
    assert_same_packed(again, repo.pair.load(repo.folder))
    assert not any(p.requires_grad for p in again.parameters())


def test_without_data_only_writers_are_measured(pair, monkeypatch):
    """Random tokens say something about a causal model, and nothing about any other.

    (These have no tokenizer; with one, they write text.)
    """

    class Measured(Exception):
        """Carries the number of tokens."""

    def measure(self, batches):
        raise Measured(sum(batch.numel() for batch in batches))

    monkeypatch.setattr(Job, "measure", measure)
    for name, method, expected in (
        ("llama", "deltamix-kl", 3 * 128),
        ("llama", "deltamix", 0),
        ("bert", "deltamix-kl", 0),
        ("t5", "deltamix-kl", 0),
    ):
        with pytest.raises(Measured, match=rf"^{expected}$"):
            pair(name).compress(method=method, num_samples=3)


@each_method
def test_records_in_the_config(delta, method):
    for calibrated in (False, True):
        repo = delta("llama", method, calibrated)
        stored = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == "deltamix" and stored["format_version"] == 2
        assert stored["method"] == method and stored.keys() >= set(SWITCHES)
        assert stored["base_model"] == str(repo.pair.base)
        keys = load_file(repo.pair.base / "model.safetensors").keys()
        assert stored["base_fingerprints"].keys() == keys
        blind = "random tokens" if method == "deltamix-kl" else "weights alone"
        source = "token ids [8, 32]" if calibrated else blind
        assert stored["calibration_source"] == source
        assert "calibration" not in stored and "base_kwargs" not in stored


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("load", "method"),
    [
        (AutoModelForCausalLM, "delta-come"),
        (LlamaForCausalLM, "delta-come"),
        (AutoModelForCausalLM, "deltamix-kl"),
    ],
)
def test_the_callers_config_is_left_alone(pair, tmp_path, load, method):
    """One config object for two fine-tunes: neither sees the other's records."""
    source = pair("llama")
    options = {**quick(method), "calibration": calibration_ids(), "ratio": 0.3}
    config = source.config(method=method, **options)
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
    assert [c.problem for c in verify_repo(str(tmp_path / "delta"))] == [None] * 6


def test_a_delta_of_whole_tensors_alone_is_saved_as_any(pair, tmp_path):
    """Nothing is packed: it has fingerprints and companions all the same."""
    source = pair("llama")
    tuned = source.load(source.base)
    tuned.model.norm.weight.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    config = source.config(ratio=None, budget_bytes=1000, method="delta-come")
    model = source.load(tmp_path / "tuned", quantization_config=config)
    model.save_pretrained(tmp_path / "delta")
    saved = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert "model.norm.weight" in saved["quantization_config"]["tensor_fingerprints"]
    assert (tmp_path / "delta" / "tokenizer.json").exists()
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(tuned))


@each_method
def test_modules_to_not_convert_are_stored_whole(pair, tmp_path, method):
    source = pair("llama")
    skip = ["lm_head", "model.layers.0", "mlp.down_proj"]
    options = {"budget_bytes": 300_000, "modules_to_not_convert": skip, **quick(method)}
    model = source.compress(method=method, ratio=None, **options)
    packed = delta_modules(model)
    assert packed and not any(
        n == "lm_head" or n.startswith("model.layers.0.") or n.endswith("down_proj") for n in packed
    )
    whole = source.load(source.tuned).state_dict()["lm_head.weight"]
    if method == "deltamix-kl":
        whole = whole.to(torch.bfloat16)
    assert torch.equal(model.lm_head.weight, whole.float())
    assert model.lm_head.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == whole.dtype
    assert torch.equal(stored["lm_head.weight"], whole)
    again = source.load(tmp_path / "delta")
    assert again.lm_head.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


@pytest.mark.untraced
@each_method
@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_base_and_fine_tune_in_different_dtypes(pair, tmp_path, base_dtype, tuned_dtype, method):
    source = pair("llama")
    for kind, folder, dtype in (("b", source.base, base_dtype), ("t", source.tuned, tuned_dtype)):
        source.load(folder, dtype=getattr(torch, dtype)).save_pretrained(tmp_path / kind)
    config = make_config(tmp_path / "b", ratio=0.2, method=method, **quick(method))
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


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "delta-come") for kind in ("list", "txt", "jsonl", "data set")),
        ("list", "deltamix-kl"),
    ],
)
def test_texts_calibrate_like_their_token_ids(pair, with_tokenizer, tmp_path, kind, method):
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
    options = {"method": method, **quick(method)}
    config = source.config(calibration=calibration, **options)
    by_text = source.load(with_tokenizer, quantization_config=config)
    by_ids = source.compress(calibration=token_ids(1, 24), **options)
    assert_same_packed(by_text, by_ids)
    blind = source.compress(**options)
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


@pytest.mark.untraced
@each_method
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_longer_than_the_model_has_positions(pair, name, method):
    """The default seq_length is 2048, these have 128 positions."""
    options = {"method": method, **quick(method)}
    model = pair(name).compress(calibration=token_ids(2, 200), **options)
    cut = pair(name).compress(calibration=token_ids(2, 200)[:, :128], **options)
    assert_same_packed(model, cut)


def test_calibration_on_text_of_its_own(pair, with_tokenizer, tmp_path):
    source, few = pair("llama"), {"num_samples": 4, "seq_length": 16, "tune_steps": 0}
    config = source.config(calibration="self", **few)
    torch.manual_seed(1)
    one = source.load(with_tokenizer, quantization_config=config)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = source.load(with_tokenizer, quantization_config=config)
    assert_same_packed(one, two)  # drawn by the seed of the config alone
    assert torch.equal(torch.get_rng_state(), state)
    records = one.config.quantization_config
    assert records.calibration_source == "4 texts written by the fine-tune"
    config = source.config(**few)  # what is done without text anyway
    three = source.load(with_tokenizer, quantization_config=config)
    assert_same_packed(one, three)
    assert three.config.quantization_config.calibration_source == records.calibration_source
    blind = source.compress(**few)
    assert records.errors != blind.config.quantization_config.errors
    one.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(one))


def test_only_a_causal_model_writes_its_own_text(pair, tmp_path):
    source = pair("bert")
    shutil.copytree(source.tuned, tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    with pytest.raises(DeltaMixError, match="BertForMaskedLM"):
        source.load(tmp_path / "tuned", quantization_config=source.config(calibration="self"))


@pytest.mark.parametrize("bad", [-1, 256])
def test_token_ids_outside_the_vocabulary(pair, bad):
    ids = calibration_ids()
    ids[3, 4] = bad
    with pytest.raises(DeltaMixError, match=r"0 to 255"):
        pair("llama").compress(calibration=ids)


def scaled(source, factor: float, folder: Path) -> Path:
    """The fine-tune with a delta `factor` times as long, in its matrices."""
    tuned, base = source.load(source.tuned), source.load(source.base).state_dict()
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if value.ndim == 2:
                value.copy_(base[name] + factor * (value - base[name]))
    tuned.save_pretrained(folder)
    return folder


def test_a_delta_far_longer_than_the_base_is_refused(pair, tmp_path):
    source = pair("llama")
    folder = scaled(source, 1e3, tmp_path / "tuned")
    with pytest.raises(DeltaMixError, match="its delta would be worse than none"):
        source.load(folder, quantization_config=source.config(method="delta-come"))


@each_method
def test_what_cannot_be_stored_is_not_saved(pair, tmp_path, monkeypatch, method):
    """A delta of 1e12 times its size has scales beyond those that are read."""
    source = pair("llama")
    folder = scaled(source, 1e12, tmp_path / "tuned")
    monkeypatch.setattr(tensor_diff, "_ABSURD", 1e30)
    config = source.config(method=method, **quick(method))
    with pytest.raises(DeltaMixError, match=r"the delta holds values up to .* the right base\?"):
        source.load(folder, quantization_config=config)


def test_what_is_infinite_in_bfloat16_is_not_saved(pair, tmp_path):
    source = pair("bert")
    tuned = source.load(source.tuned)
    bias = [value for value in tuned.parameters() if value.ndim == 1][-1]
    bias.data[1] = 3.4e38
    tuned.save_pretrained(tmp_path / "tuned")
    config = source.config(method="deltamix-kl", **quick("deltamix-kl"))
    with pytest.raises(DeltaMixError, match="infinite in bfloat16"):
        source.load(tmp_path / "tuned", quantization_config=config)


@pytest.mark.parametrize("which", ["base", "fine-tune"])
def test_who_holds_nan_is_named(pair, tmp_path, which):
    source, name = pair("llama"), "model.layers.1.mlp.up_proj"
    folders = {"base": source.base, "fine-tune": source.tuned}
    broken = source.load(folders[which])
    broken.get_submodule(name).weight.data[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    folders[which] = tmp_path / "broken"
    config = source.config(method="delta-come")
    config.base_model = str(folders["base"])
    with pytest.raises(DeltaMixError, match=rf"{name}\.weight of the {which} holds NaN"):
        source.load(folders["fine-tune"], quantization_config=config)


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5)])
def test_too_few_calibration_tokens_are_refused(pair, method, shape):
    ids = torch.full(shape, 5)
    with pytest.raises(DeltaMixError, match=f"calibration has {ids.numel()} tokens, .* or none"):
        pair("llama").compress(method=method, calibration=ids)


@pytest.mark.parametrize("method", ["delta-come", "deltamix"])
def test_one_token_again_and_again(pair, method):
    """C of rank one: the published methods measure by it all the same."""
    source = pair("llama")
    model = source.compress(method=method, calibration=torch.full((4, 9), 3))
    dense = logits(source.load(source.tuned))
    assert relative(logits(model), dense) < relative(logits(source.load(source.base)), dense)


def test_a_base_that_shares_nothing_but_its_sizes(pair, tmp_path):
    source = pair("llama")
    other = source.load(source.base)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                shape, size = parameter.shape, parameter.std()
                parameter.copy_(size * torch.randn(shape, generator=random))
    other.save_pretrained(tmp_path)
    config = source.config(method="delta-come")
    config.base_model = str(tmp_path)
    with pytest.warns(UserWarning, match=r"are 1\.4\d times the base's norm away"):
        source.load(source.tuned, quantization_config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        source.compress(method="delta-come")
