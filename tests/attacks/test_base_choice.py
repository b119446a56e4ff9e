"""The base: named by a file that somebody else wrote, and found in places that change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hostile import edit_settings, edit_weights, refusal, untouched
from local_hub import SHA, in_cache
from tiny_pairs import fine_tune, logits

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.validation import verify_repo

OTHER = "2" * 40


@pytest.fixture
def hub(attack, tmp_path):
    """A delta repo in the Hub's cache: `load(name, revision)` of the base config.json names."""
    it = attack()

    def load(name, revision=None, **options):
        cache = tmp_path / "cache"
        edit_settings(it.folder, base_model=name, base_revision=revision)
        shutil.rmtree(cache / "models--me--delta", ignore_errors=True)
        in_cache(cache, "me/delta", it.folder)
        options.setdefault("quantization_config", DeltaMixConfig(base_kwargs={"cache_dir": cache}))
        return it.pair.load("me/delta", cache_dir=cache, **options)

    load.attack, load.cache = it, tmp_path / "cache"
    return load


NOWHERE = [
    "../../etc",
    "../base",
    "./base",
    "/etc",
    "~",
    "~/base",
    "base/../../etc",
    "a/b/c",
    "me/..",
    ".",
    "..",
    "C:\\base",
    "C:/base",
    "me\\base",
    "me/base@main",
    "me/base?x=1",
    "me/base#x",
    "me base",
    "-me/base",
    "a" * 97,
]
NETWORK = [
    "http://127.0.0.1:9/base",
    "file:///etc",
    "s3://me/base",
    "\\\\server\\share",
    "//server/x",
]
UNREADABLE = ["me/base\n", "me/\x1b[2Jbase", "me/base\0", "\ud800", "me/ba\u202ese", "a" * 10_000]


@pytest.mark.parametrize("name", [*NOWHERE, *NETWORK, *UNREADABLE], ids=repr)
def test_from_the_hub_only_a_hub_id(hub, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.attack.pair.base, tmp_path / "base")  # it would load from there
    with untouched(tmp_path / "base"):
        refusal(lambda: hub(name), "the delta repo")


@pytest.mark.parametrize("name", ["base", "me/base"])
def test_from_the_hub_no_folder_of_that_name(hub, name, monkeypatch, tmp_path):
    """transformers would take the folder for the model of the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.attack.pair.base, tmp_path / name)
    with untouched(tmp_path / name):
        refusal(lambda: hub(name), "comes from the Hub", "is a path on this machine")
    given = DeltaMixConfig(base_model=name)  # but the user may
    assert torch.isfinite(logits(hub(name, quantization_config=given))).all()


def test_a_snapshot_of_the_cache_comes_from_the_hub(hub):
    base = str(hub.attack.pair.base)
    refusal(lambda: hub(base), "is a path on this machine")
    snapshot = hub.cache / "models--me--delta" / "snapshots" / SHA
    refusal(lambda: hub.attack.pair.load(snapshot), "is a path on this machine")
    *_, base = verify_repo(str(snapshot))
    assert "is a path on this machine" in str(base.problem)
    *_, base = verify_repo(str(hub.attack.folder))  # the same files, in a folder of the user's
    assert base.problem is None


@pytest.mark.parametrize("name", [*NETWORK, *UNREADABLE], ids=repr)
def test_a_folder_may_not_name_the_network_either(attack, name):
    it = attack()
    edit_settings(it.folder, base_model=name)
    refusal(it.load, "the delta repo names")
    it.serve()  # beside a running base it is not asked for another


@pytest.mark.parametrize("name", ["../../etc", "/etc", "~", "/dev/null", "", "nobody/nothing"])
def test_a_folder_may_name_a_place_but_it_must_be_a_base(attack, name):
    it = attack()
    edit_settings(it.folder, base_model=name)
    refusal(it.load, "base")


@pytest.mark.parametrize(
    "revision", ["../../x", "/etc/passwd", "\\x", "a\nb", "a\0b", "v1..v2", "x" * 256, "\ud800"]
)
def test_revisions(hub, revision):
    refusal(lambda: hub("me/base", revision), "branch or commit")


@pytest.mark.parametrize("value", [5, True, ["me/base"], {"path": "x"}, 1.5])
@pytest.mark.parametrize("key", ["base_model", "base_revision"])
def test_names_that_are_no_texts(attack, key, value):
    it = attack()
    edit_settings(it.folder, **{key: value})
    it.refused(key)


def test_another_base_of_the_same_shapes(attack, tmp_path):
    """Also when config.json vouches for part of it only."""
    it = attack()
    other = it.pair.load(it.pair.base)
    fine_tune(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    given = DeltaMixConfig(base_model=tmp_path / "other")
    refusal(lambda: it.load(quantization_config=given), "wrong base")
    edit_settings(it.folder, base_model=str(tmp_path / "other"))
    refusal(it.load, "wrong base")


def test_fewer_fingerprints_than_tensors(attack):
    """What is not vouched for is not read from the base."""
    it = attack()
    name = "model.layers.0.self_attn.o_proj.weight"

    def change(config):
        del config["quantization_config"]["base_fingerprints"][name]

    from hostile import edit_json

    edit_json(it.folder / "config.json", change)
    refusal(it.load, "wrong base", name)


@pytest.mark.parametrize("value", [{}, {"x": "y"}, {"x": 5}, {"x": None}, [], "x", None], ids=str)
def test_fingerprints_of_nothing(attack, value):
    it = attack()
    edit_settings(it.folder, base_fingerprints=value)
    it.refused()


def test_base_that_moved_on(hub, tmp_path):
    """main is another commit by now: the pinned one is asked for, and no other is taken."""
    it = hub.attack
    in_cache(hub.cache, "me/base", it.pair.base, SHA)
    before = logits(hub("me/base", SHA))
    moved = it.pair.load(it.pair.base)
    fine_tune(moved, seed=5)
    moved.save_pretrained(tmp_path / "moved")
    in_cache(hub.cache, "me/base", tmp_path / "moved", OTHER)
    assert torch.equal(logits(hub("me/base", SHA)), before)
    refusal(lambda: hub("me/base", OTHER), "wrong base")
    refusal(lambda: hub("me/base"), "wrong base")
    refusal(lambda: hub("me/base", "3" * 40), "cannot find the base model 'me/base'")


def test_base_files_that_are_not_sound(attack, tmp_path):
    it = attack()
    base = Path(shutil.copytree(it.pair.base, tmp_path / "base"))
    given = DeltaMixConfig(base_model=base)
    content = (base / "model.safetensors").read_bytes()
    for damaged in (content[:-1], content[:9], b"", content + b"x"):
        (base / "model.safetensors").write_bytes(damaged)
        refusal(lambda: it.load(quantization_config=given), "not a sound safetensors file")


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", "[" * 100_000, '{"a": 1', "\udcff"])
def test_base_config_that_is_none(attack, tmp_path, content):
    it = attack()
    base = Path(shutil.copytree(it.pair.base, tmp_path / "base"))
    (base / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    given = DeltaMixConfig(base_model=base)
    refusal(lambda: it.load(quantization_config=given), "config.json")


def test_base_with_a_tensor_twice_for_one_weight(attack, tmp_path):
    """The delta's author made the base too, and vouches for it."""
    from deltamix_hf.storage.headers import fingerprints, read_header

    it = attack()
    base = Path(shutil.copytree(it.pair.base, tmp_path / "base"))
    name = "layers.0.self_attn.o_proj.weight"
    edit_weights(base, lambda tensors: tensors.update({name: torch.ones(64, 64)}))
    found = fingerprints(read_header(base / "model.safetensors"))
    edit_settings(it.folder, base_model=str(base), base_fingerprints=found)
    refusal(it.load, "the base holds", name)


def test_a_wrong_base_is_refused_beside_a_running_model_too(attack, tmp_path):
    it = attack()
    other = it.pair.load(it.pair.base)
    fine_tune(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    model = it.pair.load(tmp_path / "other")
    before = logits(model)
    with pytest.raises(DeltaMixError, match="wrong base"):
        model.load_delta(it.folder, "attack")
    assert torch.equal(logits(model), before) and model.list_deltas() == {}
