"""What people who attacked the readers by hand found, each as it was found."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from hostile import WEIGHTS, edit_header, edit_json, edit_settings, read_raw, refusal
from safetensors.torch import load_file, save_file
from tiny_pairs import logits, make_pair, snapshot
from typer.testing import CliRunner

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.cli import app
from deltamix_hf.hub.push import push_folder

DENSE = "model.layers.0.mlp.up_proj.weight"


def problems(folder) -> str:
    return " ".join(f"{c.what}: {c.problem}" for c in verify_repo(str(folder)) if c.problem)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_name_of_a_tensor_without_end(attack, family):
    """transformers' patterns took 1.7 s for 44 kB of it, and more than 20 for 176."""
    it = attack(family)
    _, data = read_raw(it.folder / WEIGHTS)
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
    edit_header(it.folder / WEIGHTS, lambda h: h.update({"model.layers.0." * 30_000: entry}))
    began = time.monotonic()
    it.refused("is a name of 450000 characters")
    assert time.monotonic() - began < 10


def test_a_resized_name_without_end(attack):
    it = attack("llama")
    edit_settings(it.folder, resized={"model." * 50_000: [3, 2]})
    refusal(it.serve)
    assert problems(it.folder)


def test_a_base_known_by_few_of_its_tensors(delta, copied, tmp_path):
    """With the fingerprints of what differs left out, another base passed beside the model."""
    repo = delta("llama")
    other = repo.pair.load(repo.pair.base)
    other.get_parameter(DENSE).data += 0.01
    other.save_pretrained(tmp_path / "other")
    folder = copied(repo.folder)
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["base_fingerprints"].pop(DENSE) and None,
    )
    base = repo.pair.load(tmp_path / "other")
    with pytest.raises(DeltaMixError, match=f"no fingerprint of its '{DENSE}'"):
        base.load_delta(folder, "one")
    assert base.list_deltas() == {}


@pytest.mark.parametrize("size", [200, 255, 129])
def test_settings_by_which_tensors_are_decoded(delta, copied, size):
    repo = delta("llama", "delta-come")
    folder = copied(repo.folder)
    edit_settings(folder, group_size=size)
    assert "not what was saved" in problems(folder) or "needs" in problems(folder)
    for read in (repo.pair.load, lambda f: repo.pair.load(repo.pair.base).load_delta(f)):
        with pytest.raises(DeltaMixError):
            read(folder)


def test_links_out_of_the_folder(attack, tmp_path):
    it, secret = attack("llama"), tmp_path / "secret.json"
    secret.write_text('{"eos_token_id": 7, "note": "SECRET"}')
    (it.folder / "generation_config.json").unlink(missing_ok=True)
    (it.folder / "generation_config.json").symlink_to(secret)
    it.refused("lies outside its folder")


def test_a_link_to_other_weights_is_none_of_the_repo_s(delta, copied, tmp_path):
    repo = delta("llama")
    folder = copied(repo.folder)
    before = inspect_repo(folder).size
    shutil.copy(repo.pair.base / WEIGHTS, tmp_path / "other.safetensors")
    (folder / "extra.safetensors").symlink_to(tmp_path / "other.safetensors")
    assert inspect_repo(folder).size == before and problems(folder) == ""


def test_a_folder_named_like_the_hub_s_cache(delta, tmp_path):
    repo, root = delta("llama"), tmp_path / "x" / "snapshots" / ("a" * 40)
    shutil.copytree(repo.folder, root)
    shutil.move(root / WEIGHTS, tmp_path / "x" / "victim.safetensors")
    (root / WEIGHTS).symlink_to(tmp_path / "x" / "victim.safetensors")
    with pytest.raises(DeltaMixError, match="lies outside its folder"):
        repo.pair.load(repo.pair.base).load_delta(root, "one")


def test_nothing_is_sent_to_the_terminal(delta, copied):
    repo = delta("llama")
    folder = copied(repo.folder)
    bad = "\x1b[2J\x07"
    edit_json(folder / "config.json", lambda c: c.update({f"{bad}key": 3}))
    base = repo.pair.load(repo.pair.base)
    with pytest.warns(UserWarning) as told:
        base.load_delta(folder, "one")
    assert all("\x1b" not in str(warning.message) for warning in told)
    edit_settings(folder, calibration_source=f"{bad} texts")
    recorded = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_settings(folder, tensor_fingerprints=recorded["tensor_fingerprints"] | {bad: "0"})
    for command in ("inspect", "verify"):
        assert "\x1b" not in CliRunner().invoke(app, [command, str(folder)]).output


@pytest.mark.parametrize(
    "config",
    [
        "[" * 10_000,
        {"base_model": 3},
        {"base_model": ["x"]},
        {"base_model": "x" * 10_000},
        {"base_fingerprints": 5},
    ],
    ids=str,
)
def test_push_reads_config_json_as_others_do(delta, copied, config):
    folder = copied(delta("llama").folder)
    if isinstance(config, str):
        (folder / "config.json").write_text(config[:20_000])
    else:
        edit_settings(folder, **config)
    with pytest.raises(DeltaMixError):
        push_folder(folder, "me/none", base=None)


def test_push_does_not_wait_for_a_pipe(delta, copied):
    folder = copied(delta("llama").folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(DeltaMixError, match="is not a delta repo"):
        push_folder(folder, "me/none")


@pytest.mark.parametrize("odd", [7, True, {"a": 1}, "LlamaForCausalLM"])
def test_architectures_that_are_no_list(delta, copied, odd):
    folder = copied(delta("llama").folder)
    edit_json(folder / "config.json", lambda c: c.update(architectures=odd))
    assert problems(folder)
    with pytest.raises(DeltaMixError):
        inspect_repo(folder)


def test_a_huge_config_json_is_not_read(delta, copied):
    folder = copied(delta("llama").folder)
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 30)  # sparse
    refusal(lambda: inspect_repo(folder), "longer than")


def test_one_matrix_is_resized_once(tmp_path):
    pair = make_pair("llama", tmp_path, tokens=4)
    pair.compress(method="delta-come", ratio=0.5).save_pretrained(tmp_path / "delta")
    folder = tmp_path / "delta"
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    alias, rows = "embed_tokens", torch.full((4, 64), 9.0)
    stored = load_file(folder / WEIGHTS) | {f"{alias}.dm_rows": rows}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    edit_settings(
        folder,
        tensor_fingerprints=None,
        settings_fingerprint=None,
        resized=found["resized"] | {alias: found["resized"]["model.embed_tokens"]},
        overlay=sorted([*found["overlay"], f"{alias}.dm_rows"]),
    )
    with pytest.raises(DeltaMixError, match="says twice"):
        pair.load(folder)
    assert "says twice" in problems(folder)


def test_the_own_delta_comes_back_as_it_was_loaded(delta, copied):
    """From files that were replaced meanwhile: refused, not another delta."""
    repo = delta("llama", "deltamix-kl")
    folder = copied(repo.folder)
    model = repo.pair.load(folder)
    expected = logits(model)
    other = delta("llama", "deltamix-kl", seed=5)
    for name, content in snapshot(other.folder).items():
        (folder / name).write_bytes(content)
    model.load_delta(repo.folder, "second")
    model.set_delta(None)
    model.set_delta_memory(max(model.delta_memory().resident.values()))
    logits(model, delta_names="second")
    try:
        found = logits(model, delta_names="default")
    except DeltaMixError as error:
        assert "has changed" in str(error) or "not what was saved" in str(error)
    else:
        torch.testing.assert_close(found, expected)
