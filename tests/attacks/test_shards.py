"""A checkpoint's index: it names files, and each name is a chance to read something else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hostile import (
    INDEX,
    WEIGHTS,
    edit_json,
    edit_weights,
    refusal,
    refused_by_us_or_before,
    untouched,
)
from tiny_pairs import logits

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.base import resolve_base
from deltamix_hf.checkpoint.delta_repo import find_delta


@pytest.fixture
def sharded(attack, tmp_path):
    """A delta repo in shards, beside a folder that belongs to somebody else."""
    it = attack()
    it.load().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.rmtree(it.folder)
    (tmp_path / "sharded").rename(it.folder)
    return it


@pytest.fixture
def secret(sharded, tmp_path) -> Path:
    """Somebody else's folder: it holds sound shards, which would load."""
    folder = tmp_path / "secret"
    folder.mkdir()
    for shard in sharded.folder.glob("*.safetensors"):
        shutil.copy(shard, folder / shard.name)
    return folder


def first_shard(folder: Path) -> str:
    return min(path.name for path in folder.glob("*.safetensors"))


def point(folder: Path, to: str) -> None:
    """Let the index name `to` instead of the first shard."""
    shard = first_shard(folder)

    def change(index: dict) -> None:
        found = index["weight_map"]
        found |= {name: to for name, where in found.items() if where == shard}

    edit_json(folder / INDEX, change)


@pytest.mark.parametrize(
    "name",
    [
        "../secret/{shard}",
        "./../secret/{shard}",
        "{secret}/{shard}",
        "sub/../../secret/{shard}",
        "..\\secret\\{shard}",
        "C:{shard}",
        "file://{secret}/{shard}",
        "http://127.0.0.1:9/{shard}",
        "\\\\server\\share\\{shard}",
        "pytorch_model.bin",
        "{shard}\n",
        "{shard}\0",
        "",
        ".",
    ],
)
def test_names_of_other_places(sharded, secret, name):
    shard = first_shard(sharded.folder)
    (sharded.folder / "sub").mkdir()
    point(sharded.folder, name.format(secret=secret, shard=shard))
    with untouched(secret):
        refusal(sharded.serve, INDEX)
    refused_by_us_or_before(sharded.load)


@pytest.mark.parametrize("what", ["shard", "config.json", "folder"])
def test_links_out_of_the_folder(sharded, secret, what):
    """A tenant whose folder a server loads could have another's delta answer for him."""
    if what == "config.json":
        (secret / "config.json").write_bytes((sharded.folder / "config.json").read_bytes())
    name = "config.json" if what == "config.json" else first_shard(sharded.folder)
    (sharded.folder / name).unlink()
    if what == "folder":
        os.symlink(secret, sharded.folder / "sub")
        os.symlink(Path("sub") / name, sharded.folder / name)
    else:
        os.symlink(secret / name, sharded.folder / name)
    sharded.refused(name, "outside its folder")


def test_links_within_the_folder_and_to_it_are_fine(sharded, tmp_path):
    before = logits(sharded.load())
    (sharded.folder / "data").mkdir()
    name = first_shard(sharded.folder)
    (sharded.folder / name).rename(sharded.folder / "data" / name)
    os.symlink(Path("data") / name, sharded.folder / name)
    os.symlink(sharded.folder, tmp_path / "link")
    assert (logits(sharded.pair.load(tmp_path / "link")) == before).all()
    assert len(find_delta(str(tmp_path / "link"), {})[0]) > 1


def test_missing_shard(sharded):
    name = first_shard(sharded.folder)
    (sharded.folder / name).unlink()
    sharded_refusals(sharded, name)


def test_shard_that_is_a_folder(sharded):
    name = first_shard(sharded.folder)
    (sharded.folder / name).unlink()
    (sharded.folder / name).mkdir()
    sharded_refusals(sharded, name)


def sharded_refusals(it, *parts: str) -> None:
    """Both ways; files that are not there transformers itself reports."""
    refusal(it.serve, *parts)
    with pytest.raises((DeltaMixError, OSError)) as error:
        it.load()
    assert parts[0] in str(error.value)


@pytest.mark.parametrize("kind", ["lists more", "lists less"])
def test_index_of_other_tensors(sharded, kind):
    name = "model.norm.weight"

    def change(index: dict) -> None:
        if kind == "lists more":
            index["weight_map"]["model.extra.weight"] = index["weight_map"][name]
        else:
            del index["weight_map"][name]

    edit_json(sharded.folder / INDEX, change)
    sharded.refused("index" if kind == "lists more" else "shards", "incomplete")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "5",
        "{}",
        "[" * 100_000,
        '{"metadata": {}, "weight_map": {}}',
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": "x"}',
        '{"metadata": {}, "weight_map": {"a": 5}}',
        '{"metadata": {}, "weight_map": {"a": null}}',
        '{"metadata": {}, "weight_map": {"a": ["x.safetensors"]}}',
    ],
)
def test_index_that_is_none(sharded, content):
    """`from_pretrained`: transformers reads the index before it asks us, and gives up its way."""
    (sharded.folder / INDEX).write_text(content)
    refusal(sharded.serve, str(sharded.folder))
    refused_by_us_or_before(sharded.load)


def test_base_with_such_an_index(sharded, tmp_path, pair):
    base = tmp_path / "base"
    pair("llama").load(pair("llama").base).save_pretrained(base, max_shard_size="60KB")
    point(base, f"../secret/{first_shard(base)}")
    refusal(lambda: resolve_base(str(base), None, {}), INDEX, str(base))


def test_a_whole_file_beside_shards_is_the_one_that_counts(sharded, delta, pair):
    """As in transformers: what is inspected and verified is what is loaded."""
    shutil.copy(delta("llama").folder / WEIGHTS, sharded.folder)
    files, _, _ = find_delta(str(sharded.folder), {})
    assert [Path(file).name for file in files] == [WEIGHTS]
    edit_weights(sharded.folder, lambda tensors: tensors.pop("model.norm.weight"))
    sharded.refused("model.norm.weight")


def test_weights_elsewhere_by_config(sharded):
    """`transformers_weights` of config.json names another file, and a pickled one at that."""
    for name in (INDEX, "../secret/model.safetensors", "adapter_model.bin"):
        edit_json(
            sharded.folder / "config.json", lambda c, n=name: c.update(transformers_weights=n)
        )
        with pytest.raises((DeltaMixError, OSError, ValueError)) as error:
            sharded.load()
        assert name in str(error.value) or "adapter_model" in str(error.value)
    assert json.loads((sharded.folder / INDEX).read_text())
