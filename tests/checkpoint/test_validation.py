"""A sound repo passes every check; each damage is found, named, and told apart from the others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.cli import app

FILE = "model.safetensors"
MATRIX = "model.layers.0.mlp.up_proj"
NORM = "model.norm.weight"


def problems(*arguments, **options) -> dict[str, str]:
    """What was looked at -> what was wrong with it."""
    return {c.what: c.problem for c in verify_repo(*map(str, arguments), **options) if c.problem}


def change_weights(folder, **changes) -> None:
    tensors = load_file(folder / FILE)
    for name, change in changes.items():
        tensors[name] = change(tensors[name].clone())
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / FILE, {"format": "pt"})


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edited(tensor, *place):
    def change(value):
        value[place] = tensor
        return value

    return change


@pytest.mark.parametrize("method", ["deltamix-kl", "deltamix", "delta-come"])
def test_a_sound_repo(delta, method):
    repo = delta("llama_tied", method)
    checks = list(verify_repo(str(repo.folder)))
    assert [c.problem for c in checks] == [None] * 6
    assert f"{repo.pair.family.packed} packed matrices" in checks[2].what


@pytest.mark.parametrize("family", ["bert_from_headless", "t5", "gpt2"])
def test_other_architectures(delta, family):
    assert problems(delta(family).folder) == {}


def test_all_that_is_wrong_is_found_at_once(delta, copied):
    folder = copied(delta("llama_tied").folder)
    other = "model.layers.1.mlp.down_proj"
    change_weights(
        folder,
        **{
            f"{MATRIX}.dm_ranks": edited(-1, 0, 1),  # the bits of a negative NaN
            f"{other}.dm_ranks": edited(9, 0, 0),  # a width of 9
            NORM: edited(float("nan"), 3),
        },
    )
    change_config(folder, base_model="/nowhere/base", budget_bytes=1000, ratio=None)
    found = problems(folder)
    changed = {f"{MATRIX}.dm_ranks", f"{other}.dm_ranks"}
    assert set(found) >= {MATRIX, other, NORM} | changed and len(found) == 7
    assert "scale" in found[MATRIX] and "width" in found[other] and "NaN" in found[NORM]
    assert all("not what was saved" in found[name] for name in changed)
    base, size = (next(v for k, v in found.items() if start in k) for start in ("base", "bytes"))
    assert "/nowhere/base" in base and "promises at most 1,000" in size


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{MATRIX}.dm_v", lambda t: None, f"lacks {MATRIX}.dm_v"),
        (NORM, lambda t: t[:-1].contiguous(), "model.norm.weight"),
        (NORM, lambda t: t.long(), "model.norm.weight"),
    ],
)
def test_what_ends_the_list(delta, copied, name, change, message):
    folder = copied(delta("llama_tied").folder)
    change_weights(folder, **{name: change})
    (problem,) = problems(folder).values()
    assert message in problem


def test_a_truncated_file_and_no_repo_at_all(delta, copied, pair, tmp_path):
    folder = copied(delta("llama_tied").folder)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-100])
    assert len(problems(folder)) == 1
    assert "not a delta repo" in next(iter(problems(pair("llama").tuned).values()))
    assert "cannot find" in next(iter(problems(tmp_path).values()))


@pytest.mark.parametrize(
    "odd", [{"hidden_size": -8}, {"hidden_size": "x"}, {"architectures": ["T5Model"]}]
)
def test_a_config_no_model_can_be_built_from(delta, copied, odd):
    folder = copied(delta("llama_tied").folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | odd))
    ((what, problem),) = problems(folder).items()
    assert "config.json" in what and "config.json" in problem


def test_a_damaged_file_beside_the_weights_does_not_end_the_list(delta, copied):
    folder = copied(delta("llama_tied").folder)
    (folder / "left.safetensors").write_bytes(b"junk" * 10)
    *_, size, base = verify_repo(str(folder))
    assert "left.safetensors" in size.problem and base.problem is None


def test_the_base_is_read_unless_quick(delta, tmp_path):
    """One flipped bit of the base: found by its bytes, not by names."""
    repo = delta("llama_tied")
    base = tmp_path / "base"
    shutil.copytree(repo.pair.base, base)
    with open(base / FILE, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (problem,) = problems(repo.folder, base).values()
    assert "wrong base: 1 of" in problem
    assert problems(repo.folder, base, quick=True) == {}
    tensors = load_file(base / FILE)
    tensors.pop(NORM)
    save_file(tensors, base / FILE)
    (problem,) = problems(repo.folder, base, quick=True).values()
    assert "lacks 1 tensors" in problem


def test_command_says_ok_or_wrong_and_ends_with_its_status(delta, copied):
    repo = delta("llama_tied")
    fine = CliRunner().invoke(app, ["verify", str(repo.folder), "--base", str(repo.pair.base)])
    assert fine.exit_code == 0 and fine.stdout.count("ok ") == 6 and "wrong" not in fine.stdout
    folder = copied(repo.folder)
    change_weights(folder, **{NORM: lambda t: torch.full_like(t, float("inf"))})
    bad = CliRunner().invoke(app, ["verify", str(folder), "--quick"])
    assert bad.exit_code == 1 and bad.stdout.count("wrong ") == 2 and NORM in bad.stdout
