"""What the second round of people who attacked the readers by hand found."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
import transformers.backbone_utils
from hostile import WEIGHTS, edit_header, edit_json, edit_settings, read_raw, refusal, write_raw
from safetensors.torch import load_file, save_file
from tiny_pairs import logits, make_pair
from transformers import CONFIG_MAPPING, PreTrainedModel
from typer.testing import CliRunner

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.model_class import empty_model
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.checkpoint.untrusted_config import check_config
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.cli import app
from deltamix_hf.quantization.packed_layout import checked_layout


def problems(folder, base=None) -> str:
    found = verify_repo(str(folder), base and str(base))
    return " ".join(f"{c.what}: {c.problem}" for c in found if c.problem)


def set_config(folder, **values) -> None:
    edit_json(folder / "config.json", lambda c: c.update(values))
    edit_settings(folder, model_fingerprint=None)  # no attacker leaves it in


TIES = [
    ("llama_tied", "model.embed_tokens.weight", ["lm_head.weight", "model.lm_head.weight"]),
    ("llama_tied", "model.embed_tokens.weight", ["lm_head.weight"]),
    (
        "bert",
        "bert.embeddings.word_embeddings.weight",
        ["cls.predictions.decoder.weight", "bert.cls.predictions.decoder.weight"],
    ),
    (
        "bert",
        "cls.predictions.bias",
        ["cls.predictions.decoder.bias", "bert.cls.predictions.decoder.bias"],
    ),
]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(("family", "source", "names"), TIES)
def test_tensors_of_a_base_beside_a_tie(delta, tmp_path, family, source, names, equal):
    """Unpinned ones were taken for the head, once it was there under two names."""
    repo, base = delta(family), tmp_path / "base"
    shutil.copytree(repo.pair.base, base)
    held = load_file(base / WEIGHTS)
    more = {name: held[source].clone() if equal else held[source] + 1.0 for name in names}
    save_file(held | more, base / WEIGHTS, {"format": "pt"})
    given = DeltaMixConfig(base_model=base)
    if equal and len(names) == 1:  # as some checkpoints have it
        found = logits(repo.pair.load(repo.folder, quantization_config=given))
        assert torch.equal(found, logits(repo.pair.load(repo.folder)))
        assert problems(repo.folder, base) == ""
        return
    with pytest.raises(DeltaMixError, match="the model ties"):
        repo.pair.load(repo.folder, quantization_config=given)
    assert "the model ties" in problems(repo.folder, base)


def test_a_twin_in_the_base_of_embeddings_that_the_delta_replaces(tmp_path):
    """transformers untied the two, and ran with the base's head."""
    pair, base = make_pair("llama_tied", tmp_path), tmp_path / "twice"
    model = pair.compress(ratio=0.9, modules_to_not_convert=["embed_tokens"])
    model.save_pretrained(tmp_path / "delta")
    assert "model.embed_tokens.weight" in load_file(tmp_path / "delta" / WEIGHTS)
    shutil.copytree(pair.base, base)
    held = load_file(base / WEIGHTS)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(DeltaMixError, match="the delta replaces that one alone"):
        pair.load(tmp_path / "delta", quantization_config=DeltaMixConfig(base_model=base))
    assert "replaces that one alone" in problems(tmp_path / "delta", base)
    assert problems(tmp_path / "delta") == ""


@pytest.mark.parametrize("pinned", [True, False])
def test_a_head_alone_must_be_pinned_too(delta, copied, tmp_path, pinned):
    """As the twin of embeddings that the base has under no name."""
    repo, base, folder = delta("llama_tied"), tmp_path / "base", copied(delta("llama_tied").folder)
    shutil.copytree(repo.pair.base, base)
    held = load_file(base / WEIGHTS)
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    save_file(held, base / WEIGHTS, {"format": "pt"})
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    known = own["base_fingerprints"]
    known["lm_head.weight"] = known.pop("model.embed_tokens.weight")
    if not pinned:
        del known["lm_head.weight"]
    edit_settings(folder, base_fingerprints=known)
    assert ("no fingerprint of its 'lm_head.weight'" in problems(folder, base)) is not pinned


@pytest.mark.parametrize(
    "name", ["layer" * 20_000 + "!", "label" * 20_000, "_size" * 20_000 + "!"], ids=len
)
def test_a_setting_with_a_name_without_end(attack, name):
    """The pattern took 18 s for 50 kB of it."""
    it = attack()
    set_config(it.folder, text_config={name: 1})
    began = time.monotonic()
    refusal(it.serve, "a name of", "characters")
    assert "characters" in problems(it.folder)
    assert time.monotonic() - began < 10


UNKNOWN_COUNTS = [
    {"model_type": "dac", "architectures": ["DacModel"], "n_codebooks": 10**9},
    {"model_type": "dac", "architectures": ["DacModel"], "n_codebooks": 90_000_000},
    {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "depths": [1000] * 1000,
        "hidden_sizes": [8] * 1000,
    },
    {"model_type": "vits", "architectures": ["VitsModel"], "prior_encoder_num_flows": 10**8},
]


@pytest.mark.parametrize("config", UNKNOWN_COUNTS)
def test_counts_by_any_name(delta, copied, config):
    """What is built is counted: no list of names is complete."""
    folder = copied(delta("llama").folder)
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    message = refusal(lambda: inspect_repo(folder))
    assert "modules and parameters" in message or "its base has" in message
    assert message in problems(folder)


def test_a_model_of_many_tensors_may_be_built():
    """With a fingerprint for each, more modules than 5000 are."""
    config = CONFIG_MAPPING["llama"](hidden_size=8, num_attention_heads=1, num_hidden_layers=300)
    config.architectures = ["LlamaForCausalLM"]
    known = {f"model.layers.{i}.x": "0" for i in range(300 * 9)}
    config.quantization_config = {"quant_method": "deltamix", "base_fingerprints": known}
    assert sum(1 for _ in empty_model("x", config).parameters()) > 2700
    del config.quantization_config["base_fingerprints"]
    with pytest.raises(DeltaMixError, match="more than 5,000 modules"):
        empty_model("x", config)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('"zzz": [' + "[]," * 3_000_000 + "[]]", "lists"),
        ('"zzz": [' + "{}," * 3_000_000 + "{}]", "lists"),
        ('"zzz": [' + "1," * 3_000_000 + "1]", "values"),
        ('"zzz": "' + "x" * 5_000_000 + '"', "characters"),
        ('"architectures": [' + '"x",' * 3_000_000 + '"x"]', "architectures"),
    ],
    ids=["lists", "objects", "numbers", "text", "classes"],
)
def test_more_than_a_model_has_settings(attack, more, told):
    it = attack()
    text = (it.folder / "config.json").read_text().rstrip().removesuffix("}")
    (it.folder / "config.json").write_text(f"{text}, {more}}}")
    began = time.monotonic()
    refusal(it.serve, told)
    refusal(lambda: inspect_repo(it.folder), told)
    assert told in problems(it.folder)
    assert time.monotonic() - began < 20


def test_as_many_labels_as_a_model_may_have():
    labels = {str(i): f"LABEL_{i}" for i in range(100_000)}
    check_config({"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}})
    check_config({"label2id": {"building block": 1500}})
    with pytest.raises(DeltaMixError, match="label2id = 100001"):
        check_config({"label2id": {"x": 100_001}})


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": {"": "evil/kernel@main"}},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"text_config": {"attn_implementation": ["evil/kernel"]}},
        {"backbone": "evil/third", "use_timm_backbone": False},
        {"backbone": "third", "use_timm_backbone": True},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/third"}},
        {"model_type": "timm_wrapper", "architecture": "local-dir:etc"},
    ],
    ids=str,
)
def test_the_name_of_another_repo(attack, config, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError(f"looked up {args}")

    monkeypatch.setattr(transformers.backbone_utils, "hf_api", asked)
    it = attack()
    set_config(it.folder, **config)
    refusal(it.serve, "another repo")
    refusal(lambda: inspect_repo(it.folder), "another repo")
    assert "another repo" in problems(it.folder)


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "table-transformer", "maskformer"])
def test_backbones_as_transformers_saves_them(kind):
    check_config(CONFIG_MAPPING[kind]().to_dict())


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|flash_attention_3", "sdpa"])
def test_models_are_built_without_kernels(delta, copied, monkeypatch, name):
    """The names of transformers' own may be fetched from the Hub too."""
    asked = []
    plain = PreTrainedModel._check_and_adjust_attn_implementation

    def check(model, given, *args, **kwargs):
        asked.append(given)
        return plain(model, given, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    folder = copied(delta("llama").folder)
    set_config(folder, attn_implementation=name)
    assert problems(folder) == "" and inspect_repo(folder).matrices
    assert {*asked} == {"eager"}


@pytest.mark.parametrize("name", ["model:a.²", "model:a.³.x", "x.①.weight"])
def test_numbers_that_are_none(attack, delta, tmp_path, name):
    it = attack()
    header, data = read_raw(it.folder / WEIGHTS)
    more = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    write_raw(it.folder / WEIGHTS, header | {name: more}, data + b"\0")
    it.refused("a number in it that is none")
    assert "a number in it that is none" in problems(it.folder)
    repo, base = delta("llama"), tmp_path / "base"
    shutil.copytree(repo.pair.base, base)
    held = load_file(base / WEIGHTS)
    save_file(held | {name: torch.zeros(1)}, base / WEIGHTS, {"format": "pt"})
    assert "a number in it that is none" in problems(repo.folder, base)


@pytest.mark.parametrize("kind", ["F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_has_not(attack, kind):
    it = attack()
    name = "model.layers.0.self_attn.o_proj.dm_ranks"

    def change(header):
        entry = header[name]
        count = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry |= {"dtype": kind, "shape": [1, 8 * count // 6]}

    edit_header(it.folder / WEIGHTS, change)
    refusal(it.load)
    refusal(it.serve)
    assert problems(it.folder)
    refusal(lambda: inspect_repo(it.folder))


def test_no_experts_at_all():
    """The least of no counts was asked for."""
    empty = {"ranks": torch.zeros(0, 3).short(), "counts": torch.zeros(0).int()}
    with pytest.raises(DeltaMixError, match="the experts' counts do not fit"):
        checked_layout(64, 64, 0, empty, 0)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "uint8", "bool", "complex64", "Tensor", "__doc__", 3, ["float32"]]
)
def test_dtypes_in_which_no_model_is_loaded(attack, dtype):
    it = attack()
    set_config(it.folder, dtype=dtype)
    refusal(it.serve, "in which no model is loaded")
    assert "in which no model is loaded" in problems(it.folder)
    refusal(lambda: inspect_repo(it.folder), "in which no model is loaded")


def test_a_dtype_for_each_part(delta, copied):
    folder = copied(delta("llama").folder)
    set_config(folder, dtype={"": "float32"})
    assert problems(folder) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "evil"},
        {"pad_token_id": "x"},
        {"watermarking_config": {"x": 1}},
        {"early_stopping": "no"},
        {"max_new_tokens": "9"},
    ],
    ids=str,
)
def test_generation_settings_that_cannot_be_used(attack, settings):
    it = attack()
    (it.folder / "generation_config.json").write_text(json.dumps(settings))
    it.refused("generation_config.json", "is damaged")
    assert "generation_config.json" in problems(it.folder)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -(10**400)], ids=repr)
@pytest.mark.parametrize("name", ["kl", "positions"])
def test_measured_numbers_that_are_none(delta, copied, name, value):
    folder = copied(delta("llama").folder)
    edit_settings(folder, measured={"kl": 0.1, "positions": 3} | {name: value})
    refusal(lambda: inspect_repo(folder), "measured says")


def test_texts_that_no_terminal_takes(delta, copied):
    folder = copied(delta("llama").folder)
    edit_settings(folder, calibration_source="\ud800")
    for arguments in (["inspect", str(folder)], ["inspect", str(folder), "--json"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0


@pytest.mark.parametrize("command", ["merge", "generate"])
@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_weights_that_are_no_file(delta, copied, tmp_path, command, kind):
    folder = copied(delta("llama").folder)
    (folder / WEIGHTS).unlink()
    if kind == "folder":
        (folder / WEIGHTS).mkdir()
    else:
        (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    more = ["--output", str(tmp_path / "out")] if command == "merge" else ["x"]
    found = CliRunner().invoke(app, [command, str(folder), *more])
    assert isinstance(found.exception, DeltaMixError), found.exception
