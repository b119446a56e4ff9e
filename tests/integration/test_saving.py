"""Writing a delta repo: complete, all or nothing, never at the cost of what was there."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_pairs import logits, make_tokenizer, quick, snapshot, text_of, token_ids
from transformers import AutoTokenizer, modeling_utils, pipeline

from deltamix_hf import DeltaMixError
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.nn.layers import weight_of

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def with_tokenizer(pair, tmp_path_factory):
    """The llama fine-tune with a tokenizer beside it, and more files that are nobody's business."""
    folder = tmp_path_factory.mktemp("with_tokenizer") / "tuned"
    shutil.copytree(pair("llama").tuned, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "notes.md").write_text("private")
    return folder


@pytest.fixture(scope="module")
def saved(pair, with_tokenizer, tmp_path_factory):
    """The delta of the above: (model, folder)."""
    source = pair("llama")
    config = source.config(method="deltamix-kl", **quick("deltamix-kl"))
    model = source.load(with_tokenizer, quantization_config=config)
    folder = tmp_path_factory.mktemp("saved") / "delta"
    model.save_pretrained(folder)
    return model, folder


def test_tokenizer_travels(with_tokenizer, saved):
    _, folder = saved
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (folder / name).read_bytes() == (with_tokenizer / name).read_bytes()
    written = {"config.json", "generation_config.json", WEIGHTS}
    assert {file.name for file in folder.iterdir()} == names | written
    ids = token_ids(1, 9)[0]
    assert AutoTokenizer.from_pretrained(folder)(text_of(ids))["input_ids"] == ids.tolist()


def test_pipeline_runs_from_the_folder_alone(saved):
    model, folder = saved
    ids = token_ids(1, 9)
    generator = pipeline("text-generation", model=str(folder))
    output = generator(text_of(ids[0]), max_new_tokens=5, do_sample=False, return_tensors=True)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert output[0]["generated_token_ids"] == expected[0].tolist()


def test_saving_a_reloaded_model_keeps_the_tokenizer(pair, saved, tmp_path):
    _, folder = saved
    pair("llama").load(folder).save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(folder)


def test_saving_over_itself(pair, saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder, tmp_path / "repo")
    pair("llama").load(tmp_path / "repo").save_pretrained(tmp_path / "repo")
    assert snapshot(tmp_path / "repo") == snapshot(folder)


def test_saving_without_the_fine_tune_warns(pair, tmp_path):
    source = pair("llama")
    shutil.copytree(source.tuned, tmp_path / "tuned")
    model = source.load(tmp_path / "tuned", quantization_config=source.config(method="delta-come"))
    shutil.rmtree(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="tokenizer"):
        model.save_pretrained(tmp_path / "delta")
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(model))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "delta-come"),
        ("llama_tied", "delta-come"),
        ("t5", "delta-come"),
        ("llama", "deltamix-kl"),
    ],
)
def test_shards_reload_bit_equal(delta, tmp_path, name, method):
    repo = delta(name, method)
    model = repo.pair.load(repo.folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "shards" / f"{WEIGHTS}.index.json").exists()
    again = repo.pair.load(tmp_path / "shards")
    assert torch.equal(logits(again), repo.logits)
    again.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (repo.folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_offload_of_shards(delta, tmp_path, method):
    repo = delta("llama", method)
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    device_map = {"model": "disk", "lm_head": "cpu"}
    model = repo.pair.load(
        tmp_path / "shards", device_map=device_map, offload_folder=tmp_path / "off"
    )
    torch.testing.assert_close(logits(model), repo.logits, rtol=1e-5, atol=1e-5)


def test_an_earlier_save_is_replaced(delta, tmp_path):
    """No shard of an earlier save may stay and be loaded; other files may."""
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    model.save_pretrained(tmp_path / "repo", max_shard_size="20KB")
    (tmp_path / "repo" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "repo")
    names = {file.name for file in (tmp_path / "repo").iterdir()}
    assert names == {"config.json", "generation_config.json", WEIGHTS, "README.md"}
    model.save_pretrained(tmp_path / "repo", max_shard_size="20KB")
    assert not (tmp_path / "repo" / WEIGHTS).exists()
    assert torch.equal(logits(repo.pair.load(tmp_path / "repo")), repo.logits)


def test_new_folders_have_the_usual_permissions(delta, tmp_path):
    repo = delta("llama")
    (tmp_path / "usual").mkdir()
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "repo")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("usual", "repo")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_save_leaves_everything_as_it_was(delta, tmp_path, monkeypatch, existing):
    """The disk fills up while the second shard is written."""
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    if existing:
        shutil.copytree(repo.folder, tmp_path / "out" / "repo")
    before = snapshot(tmp_path)
    written = []
    plain = modeling_utils.safe_save_file

    def failing(tensors, file, metadata=None):
        if written:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        plain(tensors, file, metadata=metadata)

    monkeypatch.setattr(modeling_utils, "safe_save_file", failing)
    with pytest.raises(DeltaMixError, match="No space left") as error:
        model.save_pretrained(tmp_path / "out" / "repo", max_shard_size="20KB")
    assert written and str(tmp_path / "out" / "repo") in str(error.value)
    assert snapshot(tmp_path) == before
    assert existing or not any((tmp_path / "out").iterdir())


def test_killed_by_the_user_leaves_everything_as_it_was(delta, tmp_path, monkeypatch):
    repo = delta("llama")
    model = repo.pair.load(repo.folder)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(modeling_utils, "safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "repo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_target_that_is_a_file(delta, tmp_path, below):
    repo = delta("llama")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeltaMixError, match="cannot write to") as error:
        repo.pair.load(repo.folder).save_pretrained(tmp_path / "file" / below)
    assert str(tmp_path / "file") in str(error.value)
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_target_on_a_read_only_file_system(delta):
    repo = delta("llama")
    with pytest.raises(DeltaMixError, match="cannot write to"):
        repo.pair.load(repo.folder).save_pretrained("/proc/deltamix")


def test_relative_and_home_free_paths(delta, tmp_path, monkeypatch):
    repo = delta("llama")
    monkeypatch.chdir(tmp_path)
    repo.pair.load(repo.folder).save_pretrained("repo/")
    assert torch.equal(logits(repo.pair.load("repo")), repo.logits)


def test_base_given_by_relative_path_is_found_from_elsewhere(pair, tmp_path, monkeypatch):
    source = pair("llama")
    monkeypatch.chdir(source.base.parent)
    config = source.config(method="delta-come")
    config.base_model = os.path.relpath(source.base)
    model = source.load(source.tuned, quantization_config=config)
    model.save_pretrained(tmp_path / "delta")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(logits(source.load(tmp_path / "delta")), logits(model))


def test_other_processes_write_nothing(saved, tmp_path):
    """Distributed training calls save_pretrained on every rank; only one of them writes."""
    model, folder = saved
    shutil.copytree(folder, tmp_path / "repo")
    model.save_pretrained(tmp_path / "repo", is_main_process=False)
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert snapshot(tmp_path / "repo") == snapshot(folder)
    assert not (tmp_path / "new").exists()


def test_edited_base_weights_are_refused(delta, tmp_path):
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    with torch.no_grad():
        weight_of(model.model.layers[1].mlp.up_proj)[3, 4] += 1
    with pytest.raises(DeltaMixError, match=r"layers\.1\.mlp\.up_proj\.weight was edited"):
        model.save_pretrained(tmp_path / "repo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_edited_overlay_is_saved(delta, tmp_path, method):
    """A norm trained further is an ordinary tensor of the overlay, rounded as the others are."""
    repo = delta("llama", method)
    model = repo.pair.load(repo.folder)
    with torch.no_grad():
        norm = model.model.norm.weight
        norm += 0.5
        if method == "deltamix-kl":
            norm.copy_(norm.bfloat16())
    model.save_pretrained(tmp_path / "repo")
    again = repo.pair.load(tmp_path / "repo")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), repo.logits)


@pytest.mark.parametrize("which", ["tuned", "base"])
def test_a_delta_never_replaces_a_whole_model(pair, tmp_path, which):
    source = pair("llama")
    copies = {name: tmp_path / name for name in ("tuned", "base")}
    for name, copy in copies.items():
        shutil.copytree(getattr(source, name), copy)
    config = source.config(method="delta-come")
    config.base_model = str(copies["base"])
    model = source.load(copies["tuned"], quantization_config=config)
    before = snapshot(tmp_path)
    with pytest.raises(DeltaMixError, match="holds the weights of a whole model"):
        model.save_pretrained(copies[which])
    assert snapshot(tmp_path) == before


def test_files_of_others_are_never_removed(delta, tmp_path):
    repo, folder = delta("llama"), tmp_path / "repo"
    model = repo.pair.load(repo.folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    names = ("modelXL.safetensors", "model-00001.safetensors", "model_ema.safetensors.index.json")
    for name in names:
        (folder / name).write_text("mine")
    model.save_pretrained(folder)
    for name in names:
        assert (folder / name).read_text() == "mine"
    assert not list(folder.glob("model-*-of-*"))


@pytest.fixture
def elsewhere():
    """A folder on another file system, in memory."""
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == Path.cwd().stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def test_a_link_to_another_file_system(delta, tmp_path, elsewhere):
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    (tmp_path / "link").symlink_to(elsewhere)
    for _ in range(2):  # into an empty folder, and over itself
        model.save_pretrained(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert snapshot(elsewhere) == snapshot(repo.folder)


def test_no_room_is_said_before_computing(pair, tmp_path, monkeypatch):
    source, usage = pair("llama"), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DeltaMixError, match=r"takes up to 0\.\d MB.* 0\.0 MB left: make room"):
        compress_streaming(source.tuned, tmp_path / "delta", source.config(method="delta-come"))
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from transformers import AutoModelForCausalLM
import deltamix_hf
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_pretrained(sys.argv[2])
except deltamix_hf.DeltaMixError as error:
    print("refused:", error)
"""


def test_a_file_size_limit_is_one_clear_error(delta, tmp_path, copied):
    folder = copied(delta("llama").folder)
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", LIMITED, str(folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "refused: cannot write to" in done.stdout and "make room" in done.stdout, done.stderr
    assert snapshot(tmp_path) == before
