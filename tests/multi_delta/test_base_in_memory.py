"""The base beside which a delta is loaded: found where it was fetched from, and as it is there."""

from __future__ import annotations

import gc
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from local_hub import SHA, in_cache
from many_deltas import CLOSE
from peft import LoraConfig, get_peft_model
from tiny_pairs import logits, make_tokenizer, quick, text_of, token_ids
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.constants import FETCHED

FAMILIES = ["llama", pytest.param("mixtral", marks=pytest.mark.untraced)]


def check(model: PreTrainedModel, repo) -> None:
    """The delta beside this base is what it is by itself."""
    model.load_delta(repo.folder, "one")
    torch.testing.assert_close(logits(model), repo.logits, **CLOSE)


def renamed(folder: Path, target: Path, variant: str) -> Path:
    """A copy whose weights are of a variant, as transformers names them."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").rename(target / f"model.{variant}.safetensors")
    return target


@pytest.mark.parametrize("how", ["subfolder", "variant", "shards of a variant", "both"])
def test_found_again_in_a_folder(delta, tmp_path, how):
    repo = delta("llama")
    load, base = AutoModelForCausalLM.from_pretrained, repo.pair.base
    if how == "subfolder":
        shutil.copytree(base, tmp_path / "repo" / "inner")
        model = load(tmp_path / "repo", subfolder="inner")
    elif how == "variant":
        model = load(renamed(base, tmp_path / "base", "fp16"), variant="fp16")
    elif how == "both":
        renamed(base, tmp_path / "repo" / "inner", "x")
        model = load(tmp_path / "repo", subfolder="inner", variant="x")
    else:
        load(base).save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="50KB")
        assert len(list((tmp_path / "base").glob("model.fp16-*.safetensors"))) > 1
        model = load(tmp_path / "base", variant="fp16")
    check(model, repo)


@pytest.mark.parametrize("kind", ["auto", "own", "with info"])
def test_found_again_in_a_cache(delta, tmp_path, kind):
    repo, cache = delta("llama"), tmp_path / "cache"
    in_cache(cache, "me/base", repo.pair.base)
    place = cache / "models--me--base" / "refs"
    (place / "release").write_text(SHA)
    (place / "main").write_text("3" * 40)  # another commit, which is not here
    given = {"cache_dir": cache, "revision": "release"}
    if kind == "with info":
        model, _ = LlamaForCausalLM.from_pretrained("me/base", output_loading_info=True, **given)
    else:
        load = (AutoModelForCausalLM if kind == "auto" else LlamaForCausalLM).from_pretrained
        model = load("me/base", **given)
    check(model, repo)


def test_a_delta_of_a_cache_has_its_base_there(delta, copied, tmp_path):
    """Alone, compressed anew, and with companions of a fine-tune that is there."""
    source, cache = delta("llama"), tmp_path / "cache"
    in_cache(cache, "me/base", source.pair.base)
    tuned = copied(source.pair.tuned)
    (tuned / "source.spm").write_text("pieces")
    in_cache(cache, "me/tuned", tuned)
    config = source.pair.config(method="delta-come")
    config.base_model = "me/base"
    load = AutoModelForCausalLM.from_pretrained
    made = load("me/tuned", cache_dir=cache, quantization_config=config)
    made.save_pretrained(tmp_path / "delta")
    assert (tmp_path / "delta" / "source.spm").exists()
    assert "cache_dir" not in (tmp_path / "delta" / "config.json").read_text()
    in_cache(cache, "me/delta", tmp_path / "delta")
    for place in ("me/delta", tmp_path / "delta"):
        assert torch.equal(logits(load(place, cache_dir=cache)), logits(made))
        with pytest.raises(DeltaMixError, match="cannot find the base model 'me/base'"):
            other = DeltaMixConfig(base_kwargs={"cache_dir": tmp_path / "empty"})
            load(place, cache_dir=cache, quantization_config=other)


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_fine_tune_in_a_subfolder(delta, copied, tmp_path, place):
    """Its tokenizer is there, for calibration, and so is what is saved along."""
    source = delta("llama")
    tuned = copied(source.pair.tuned)
    make_tokenizer().save_pretrained(tuned)
    (tuned / "source.spm").write_text("pieces")
    if place == "folder":
        shutil.copytree(tuned, tmp_path / "repo" / "inner")
        (tmp_path / "repo" / "outer.spm").write_text("another's")
        name, given = tmp_path / "repo", {}
    else:
        snapshot, name = in_cache(tmp_path, "me/tuned", tuned), "me/tuned"
        files = list(snapshot.iterdir())
        (snapshot / "inner").mkdir()
        for file in files:
            (snapshot / "inner" / file.name).symlink_to(file.resolve())
            file.unlink()
        given = {"cache_dir": tmp_path}
    config = source.pair.config(calibration=[text_of(token_ids(1, 30)[0])], **quick("deltamix-kl"))
    load = AutoModelForCausalLM.from_pretrained
    made = load(name, subfolder="inner", quantization_config=config, **given)
    made.save_pretrained(tmp_path / "delta")
    names = {path.name for path in (tmp_path / "delta").rglob("*")}
    assert names == {path.name for path in tuned.iterdir()}
    assert torch.equal(logits(load(tmp_path / "delta")), logits(made))


def test_what_is_remembered_is_in_no_file_and_no_model(delta, tmp_path):
    repo = delta("llama")
    model = AutoModelForCausalLM.from_pretrained(repo.pair.base, token="hf_secret")
    assert FETCHED[model] == {"token": "hf_secret"}
    check(model, repo)
    plain = AutoModelForCausalLM.from_pretrained(repo.pair.base, token="hf_secret")
    torch.save(plain, tmp_path / "plain.pt")
    assert b"hf_secret" not in (tmp_path / "plain.pt").read_bytes()
    del model, plain
    gc.collect()
    assert not any("token" in how for how in FETCHED.values())
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters
    assert "cache_dir" in named and LlamaForCausalLM.from_pretrained.__self__ is LlamaForCausalLM


def merged(model: PreTrainedModel) -> PreTrainedModel:
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).merge_and_unload()


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():  # by name: `.weight` of a layer with deltas is base + delta
        dict(model.named_parameters())["lm_head.weight"].mul_(1.01)
    return model


def one_row(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.get_input_embeddings().weight[77] += 1
    return model


def one_norm(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n)[3] = 0
    return model


@pytest.mark.parametrize("edit", [merged, scaled, one_row, one_norm])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_edited_in_memory_is_refused(delta, name, edit):
    repo = delta(name)
    model = edit(repo.pair.load(repo.pair.base))
    with pytest.raises(DeltaMixError, match="was edited in memory"):
        model.load_delta(repo.folder, "one")
    assert "dm_deltas" not in model.__dict__


@pytest.mark.untraced
def test_edited_experts_are_refused(delta):
    repo = delta("mixtral")
    model = repo.pair.load(repo.pair.base)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 3)[1, 5] += 1
    with pytest.raises(DeltaMixError, match=r"experts\..* was edited in memory"):
        model.load_delta(repo.folder, "one")


@pytest.mark.parametrize("own", [False, True], ids=["base", "own delta"])
def test_edited_after_the_first_delta(delta, own):
    repo = delta("llama")
    model = repo.pair.load(repo.folder if own else repo.pair.base)
    model.load_delta(repo.folder, "one")
    model.load_delta(repo.folder, "two")
    before = logits(model, delta_names="two")
    with pytest.raises(DeltaMixError, match="was edited in memory"):
        scaled(model).load_delta(repo.folder, "three")
    assert set(model.list_deltas()) == {"one", "two"} | ({"default"} if own else set())
    assert not torch.equal(logits(model, delta_names="two"), before)  # it was edited


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters_merged_after_the_first_delta(delta, target):
    repo = delta("llama")
    model = repo.pair.load(repo.pair.base)
    model.load_delta(repo.folder, "one")
    model.set_delta(None)
    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    model.load_delta(repo.folder, "two")  # beside a base that is as it was
    adapted.merge_adapter()
    with pytest.raises(DeltaMixError, match="was edited in memory"):
        model.load_delta(repo.folder, "three")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_dtypes_are_the_same_base(delta, name):
    repo = delta(name)
    load = repo.pair.load
    for model in (
        load(repo.pair.base, dtype=torch.bfloat16),
        load(repo.pair.base, dtype=torch.bfloat16).float(),
        load(repo.pair.base).half(),
        load(repo.pair.base).double(),
    ):
        model.load_delta(repo.folder, "one")
