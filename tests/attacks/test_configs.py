"""config.json edited: options it may not set, code it would like run, sizes without end."""

from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hostile import (
    WEIGHTS,
    edit_json,
    edit_settings,
    refusal,
    refused_by_us_or_before,
    untouched,
)
from tiny_pairs import logits
from transformers import AutoModelForSequenceClassification

from deltamix_hf import DeltaMixConfig, DeltaMixError

# Whoever loads chooses these: token, proxies, cache, where to write.
ONLY_THE_USERS = {
    "base_kwargs": {"cache_dir": "/tmp/theirs", "proxies": {"https": "http://127.0.0.1:9"}},
    "checkpoint_dir": "/tmp/theirs",
    "base_given": True,
}


@pytest.mark.parametrize("option", ONLY_THE_USERS)
@pytest.mark.parametrize("given", [True, False])
def test_options_for_the_user_alone(attack, option, given):
    """Refused, not ignored: we never write them, so the file was edited."""
    it = attack()
    edit_settings(it.folder, **{option: ONLY_THE_USERS[option] if given else False})
    it.refused("config.json sets", option)


@pytest.mark.parametrize("key", ["self", "cls", "kwargs", "__class__", "surprise", "", "\x1b[2J"])
def test_unknown_options(attack, key):
    it = attack()
    edit_settings(it.folder, **{key: 1})
    it.refused("has no option")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "gptq"),
        ("quant_method", ["deltamix"]),
        ("format_version", 3),
        ("format_version", 10**400),
        ("format_version", None),
        ("method", {}),
        ("bits", [2**63]),
        ("bits", {"3": 1}),
        ("bits", "38"),
        ("ratio", float("nan")),
        ("ratio", 10**400),
        ("ratio", "1/16"),
        ("errors", {"model": None}),
        ("errors", {"model.layers.7.mlp.up_proj": 0.1}),
        ("errors", [1]),
        ("measured", {"kl": "<script>"}),
        ("measured", 5),
        ("dropped", 5),
        ("dropped", "model"),
        ("dropped", [5]),
        ("overlay", {"a": 1}),
        ("overlay", [None]),
        ("overlay", []),
        ("overlay", ["model.norm.weight"]),
        ("calibration", {"a": 1}),
        ("calibration", ""),
        ("calibration_source", ["text"]),
        ("modules_to_not_convert", "model"),
        ("modules_to_not_convert", [1]),
        ("seed", -1),
        ("tune_steps", 1.5),
        ("whiten", "yes"),
        ("embedding_group_size", 17),
        ("embedding_group_size", 2**20),
    ],
    ids=str,
)
def test_values(attack, key, value):
    it = attack("llama", "delta-come")
    edit_json(it.folder / "config.json", lambda c: c["quantization_config"].update({key: value}))
    refusal(it.serve)
    refused_by_us_or_before(it.load)


@pytest.mark.parametrize("settings", [None, [], "deltamix", 5, {}, {"quant_method": None}], ids=str)
def test_settings_that_are_none(attack, settings):
    """Then transformers does not ask us; the guards stop it from making a model of noise."""
    it = attack()
    edit_json(it.folder / "config.json", lambda c: c.update(quantization_config=settings))
    refusal(it.serve, "is not a delta repo")
    refused_by_us_or_before(it.load)


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "5", '"x"', "{", "{}", "[" * 100_000, "\udcff", '{"a":1}{"b":2}']
)
def test_config_that_is_none(attack, content):
    it = attack()
    (it.folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refusal(it.serve, str(it.folder))
    refused_by_us_or_before(it.load)


def test_config_longer_than_any(attack):
    """A sparse file: no disk, and gigabytes of memory for who reads it."""
    it = attack()
    with open(it.folder / "config.json", "r+b") as handle:
        handle.truncate(4 << 30)
    refusal(it.serve, "config.json", "longer than")


SIZES = [0, 1, 3, 2**20, 2**31, 2**40, -1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim"]
)
def test_sizes_of_another_model(attack, key, size):
    """On paper (meta tensors) any size costs nothing; it must be refused before it is real."""
    it = attack()
    edit_json(it.folder / "config.json", lambda c: c.update({key: size}))
    refused_by_us_or_before(it.load)


@pytest.mark.parametrize("layers", [0, 1, 3, 40])
@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["Other"], [], None, "x", 5])
def test_fewer_and_more_layers(attack, layers, architectures):
    """Whatever class it claims to be of, no layer of the model is made up."""
    it = attack()
    edit_json(
        it.folder / "config.json",
        lambda c: c.update(num_hidden_layers=layers, architectures=architectures),
    )
    refused_by_us_or_before(it.load)


def test_a_head_without_bound(attack):
    """Another class may bring a head of its own; transformers makes it, of the size config says."""
    it = attack()
    load = partial(AutoModelForSequenceClassification.from_pretrained, it.folder)
    edit_json(it.folder / "config.json", lambda c: c.update(num_labels=3))
    assert load().num_labels == 3
    edit_json(it.folder / "config.json", lambda c: c.update(num_labels=20_000))
    refusal(load, "most of this LlamaForSequenceClassification")


def marked(folder: Path, marker: Path) -> str:
    """Python source that leaves a mark when it is run."""
    return f"open({str(marker)!r}, 'w').write('executed')\n"


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_the_weights(attack, tmp_path, known):
    """`auto_map` names it, `trust_remote_code` in a file asks for it: only the caller may."""
    it, marker = attack(), tmp_path / "marker"
    source = marked(it.folder, marker)
    for name in ("evil.py", "custom_generate/generate.py"):
        (it.folder / name).parent.mkdir(exist_ok=True)
        (it.folder / name).write_text(source + "class Model: pass\nclass Config: pass\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    def change(config):
        config |= {"auto_map": names, "trust_remote_code": True, "custom_generate": "."}
        if not known:
            config["model_type"] = "evil"

    edit_json(it.folder / "config.json", change)
    if known:
        assert torch.isfinite(logits(it.load())).all()
    else:
        with pytest.raises(ValueError, match=r"trust_remote_code|model_type"):
            it.load()
    edit_settings(it.folder, auto_map=names, trust_remote_code=True)
    it.refused("auto_map") if known else refusal(it.serve, "auto_map")
    assert not marker.exists() and "evil" not in sys.modules


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "executed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS])
def test_a_pickle_instead_of_weights(attack, tmp_path, name):
    it, marker = attack(), tmp_path / "marker"
    (it.folder / WEIGHTS).unlink()
    (it.folder / name).write_bytes(pickle.dumps(Evil(marker)))
    refusal(it.serve)
    with pytest.raises((DeltaMixError, OSError, pickle.UnpicklingError, ValueError)):
        it.load()
    torch.save({"x": Evil(marker)}, it.folder / name)
    with pytest.raises((DeltaMixError, OSError, pickle.UnpicklingError, ValueError)):
        it.load()
    assert not marker.exists()


def test_calibration_data_is_not_read_again(attack, tmp_path):
    """The name of the data is a record of how the delta was made; loading has no use for it."""
    it, secret = attack(), tmp_path / "secret"
    secret.mkdir()
    (secret / "texts.txt").write_text("secret")
    edit_settings(it.folder, calibration=str(secret / "texts.txt"))
    with untouched(secret):
        assert torch.isfinite(logits(it.load())).all()
        it.serve()


def test_the_user_may_say_all_of_it(attack, tmp_path):
    """What a file may not set, the one who loads may."""
    it = attack()
    options = {"base_kwargs": {"local_files_only": True}, "checkpoint_dir": tmp_path}
    given = DeltaMixConfig(base_model=it.pair.base, **options)
    assert torch.equal(logits(it.load(quantization_config=given)), logits(it.load()))
    it.load(quantization_config=given).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not written.keys() & ONLY_THE_USERS.keys()
