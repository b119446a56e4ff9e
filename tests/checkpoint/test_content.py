"""What a delta's own tensors should be is recorded: whoever reads it sees one flipped bit."""

from __future__ import annotations

import json

import pytest
import torch
from hostile import WEIGHTS, edit_settings, edit_weights, read_raw
from safetensors.torch import load_file
from tiny_pairs import logits

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.storage.headers import fingerprints, read_header

UNREAD = DeltaMixConfig(verify_tensors=False)


def flip(folder, part: str) -> str:
    """Flip a bit of the first tensor of this part; returns its name."""
    header, _ = read_raw(folder / WEIGHTS)
    name = next(n for n in sorted(header) if n.endswith(part))
    content = bytearray((folder / WEIGHTS).read_bytes())
    info = read_header(folder / WEIGHTS)[name]
    content[(info.start + info.end) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    return name


def problems(folder) -> str:
    return " ".join(f"{c.what}: {c.problem}" for c in verify_repo(str(folder)) if c.problem)


def test_saving_records_every_tensor(delta):
    repo = delta("llama")
    recorded = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert recorded["tensor_fingerprints"].keys() == load_file(repo.folder / WEIGHTS).keys()
    assert recorded["tensor_fingerprints"] == fingerprints(read_header(repo.folder / WEIGHTS))


@pytest.mark.parametrize("part", [".dm_v", ".dm_u", ".dm_ranks", "norm.weight"])
def test_a_flipped_bit_is_seen(delta, copied, pair, part):
    repo = delta("llama", "deltamix-kl")
    folder = copied(repo.folder)
    assert problems(folder) == ""
    name = flip(folder, part)
    assert f"{name}: it is not what was saved" in problems(folder)
    with pytest.raises(DeltaMixError, match=f"{name} in .* is not what was saved"):
        repo.pair.load(folder)
    base = repo.pair.load(repo.pair.base)
    with pytest.raises(DeltaMixError, match=f"{name} in .* is not what was saved"):
        base.load_delta(folder, "one")
    assert base.list_deltas() == {}


def test_whoever_loads_may_do_without(delta, copied):
    repo = delta("llama", "deltamix-kl")
    folder = copied(repo.folder)
    flip(folder, ".dm_v")
    found = logits(repo.pair.load(folder, quantization_config=UNREAD))
    assert not torch.equal(found, repo.logits)
    base = repo.pair.load(repo.pair.base)
    base.load_delta(folder, "one", verify_tensors=False)
    torch.testing.assert_close(logits(base), found)


def test_repos_of_before_load(delta, copied):
    folder = copied(delta("llama").folder)
    edit_settings(folder, tensor_fingerprints=None, dequantize=False)
    assert torch.equal(logits(delta("llama").pair.load(folder)), delta("llama").logits)
    assert any("made by an earlier version" in c.what for c in verify_repo(str(folder)))
    assert problems(folder) == ""


@pytest.mark.parametrize("change", [{"more.weight": "0" * 32}, {}])
def test_a_record_of_other_tensors(delta, copied, change):
    folder = copied(delta("llama").folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    recorded = config["tensor_fingerprints"]
    recorded.pop("model.norm.weight")
    edit_settings(folder, tensor_fingerprints=recorded | change)
    assert problems(folder) != ""
    with pytest.raises(DeltaMixError, match=r"lacks more|model\.norm\.weight"):
        delta("llama").pair.load(folder)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_delta_that_changed_while_it_was_out_of_memory(delta, copied, recorded):
    """Read again after it was moved out: the same bytes, or one error and the base unharmed."""
    repo = delta("llama", "deltamix-kl")
    folder = copied(repo.folder)
    if not recorded:
        edit_settings(folder, tensor_fingerprints=None)
    model = repo.pair.load(repo.pair.base)
    expected = logits(model)
    model.load_delta(repo.folder, "sound")
    model.load_delta(folder, "one")
    size = max(model.delta_memory().resident.values())
    assert torch.equal(logits(model, delta_names="one"), logits(model, delta_names="sound"))
    model.set_delta("sound")
    model.set_delta_memory(int(1.5 * size))
    assert model.delta_memory().resident.keys() == {"sound"}
    flip(folder, ".dm_v")
    model.set_delta(None)
    with pytest.raises(DeltaMixError, match=r"not what was saved|has changed since it was loaded"):
        logits(model, delta_names="one")
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model, delta_names="sound"), repo.logits)


@pytest.mark.parametrize(("name", "value"), [("dequantize", True), ("verify_tensors", False)])
def test_no_file_says_how_it_is_to_be_loaded(delta, copied, name, value):
    folder = copied(delta("llama").folder)
    edit_settings(folder, **{name: value})
    with pytest.raises(DeltaMixError, match=rf"config\.json sets {name}"):
        delta("llama").pair.load(folder)


@pytest.mark.parametrize(
    ("dtype", "stored", "value"),
    [(torch.float32, torch.float64, 1e300), (torch.float16, torch.float32, 1e6)],
)
def test_finite_in_the_file_and_infinite_in_the_model(delta, copied, dtype, stored, value):
    repo = delta("llama")
    folder = copied(repo.folder)
    edit_settings(folder, tensor_fingerprints=None)
    name = "model.norm.weight"
    edit_weights(folder, lambda t: t.update({name: t[name].to(stored).fill_(value)}))
    with pytest.raises(DeltaMixError, match=f"{name} of the delta repo holds"):
        repo.pair.load(folder, dtype=dtype)
    base = repo.pair.load(repo.pair.base, dtype=dtype)
    with pytest.raises(DeltaMixError, match=f"{name} .* infinite in the model's {dtype}"):
        base.load_delta(folder, "one")
    assert base.list_deltas() == {}


@pytest.mark.parametrize(
    "edit",
    [
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        {"hidden_act": "gelu"},
        {"a_setting_of_nobody": 1},
    ],
    ids=str,
)
def test_settings_of_the_model_that_were_changed_are_seen(delta, copied, edit):
    repo = delta("llama", "deltamix-kl")
    folder = copied(repo.folder)
    assert not [c for c in verify_repo(str(folder)) if c.problem]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    problems = [check.problem for check in verify_repo(str(folder)) if check.problem]
    assert any("settings of the model are not what was saved" in problem for problem in problems)


def test_dropped_matrices_that_were_changed_are_seen(delta, copied):
    repo = delta("llama_tied", "deltamix-kl")
    folder = copied(repo.folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dropped"] = ["lm_head"]
    path.write_text(json.dumps(config))
    problems = [check.problem for check in verify_repo(str(folder)) if check.problem]
    assert any("settings of the model are not what was saved" in problem for problem in problems)


def test_saving_again_and_what_transformers_notes_change_nothing(delta, copied, tmp_path):
    repo = delta("llama", "deltamix-kl")
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "again")
    path = tmp_path / "again" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "9.9"}))
    assert not [check for check in verify_repo(str(tmp_path / "again")) if check.problem]
