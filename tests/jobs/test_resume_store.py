"""An interrupted compression goes on where it was and ends with the same bytes.

A crash is simulated at every part that the store is to keep; the slow test kills real processes.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crashes import Crash, crash_at
from tiny_pairs import Pair, calibration_ids, quick, snapshot

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.compression import job, runs
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.jobs.resume_store import ResumeStore, TensorList, job_identity


def compress(pair: Pair, output: Path, work: Path | None, **options) -> None:
    model = pair.compress(checkpoint_dir=work, **options)
    model.save_pretrained(output)


METHODS = {
    "deltamix-kl": quick("deltamix-kl"),
    "deltamix": {"calibration": calibration_ids(), "sequential": True},
    "delta-come": {"calibration": calibration_ids()},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_crash_at_any_part_changes_no_byte(pair, tmp_path, method):
    source, options = pair("llama_tied"), {"method": method, **METHODS[method]}
    compress(source, tmp_path / "whole", None, **options)
    expected = snapshot(tmp_path / "whole")
    work, output = tmp_path / "work", tmp_path / "out"
    parts = 0
    while parts < 100:  # the same job, killed again and again
        with pytest.MonkeyPatch.context() as patch:
            kept = crash_at(patch, 4)
            try:
                compress(source, output, work, **options)
                break
            except Crash:
                assert not output.exists()
            finally:
                parts += len(kept)
    assert parts >= 11  # every matrix, at the least, was kept once
    assert snapshot(output) == expected
    assert not work.exists()


def test_what_is_finished_is_not_done_again(pair, tmp_path, monkeypatch):
    source, work, options = pair("llama_tied"), tmp_path / "work", METHODS["deltamix-kl"]
    source.compress(checkpoint_dir=work, **options)  # never saved
    done: list[str] = []
    monkeypatch.setattr(
        job.Compressor, "_compress", lambda self, name, *rest: done.append(name) or 1 / 0
    )
    monkeypatch.setattr(runs, "collect", lambda *arguments: done.append("statistics") or 1 / 0)
    source.compress(checkpoint_dir=work, **options)
    assert done == []
    with pytest.raises(ZeroDivisionError):  # other options: another job
        source.compress(checkpoint_dir=work, seed=1, **options)


def test_an_edited_fine_tune_or_text_is_another_job():
    weights = {"w": torch.ones(3, 2)}
    first = job_identity({"ratio": 0.1}, weights)
    assert first == job_identity({"ratio": 0.1}, {"w": torch.ones(3, 2)})
    others = [
        job_identity({"ratio": 0.2}, weights),
        job_identity({"ratio": 0.1}, {"w": torch.ones(2, 3)}),
        job_identity({"ratio": 0.1}, {"w": torch.ones(3, 2).bfloat16()}),
        job_identity({"ratio": 0.1}, {"w": torch.tensor([[1, 1], [1, 1], [1, 2.0]])}),
        job_identity({"ratio": 0.1}, {"v": torch.ones(3, 2)}),
    ]
    assert len({first, *others}) == 6


def test_parts_come_back_as_they_were(tmp_path):
    store = ResumeStore(tmp_path / "work", "abc")
    tensors = {"a": torch.arange(5).to(torch.int16), "b": torch.zeros(0, 3), "c": torch.tensor(0.1)}
    store.write("some/part ..", tensors, [0.1, None, "text"])
    found, facts = store.read("some/part ..")
    assert facts == [0.1, None, "text"]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert "some/part .." in store and "other" not in store
    assert store.read("other") is None
    assert ResumeStore(tmp_path / "work", "another").read("some/part ..") is None
    store.remove()
    assert not (tmp_path / "work").exists()


def test_a_torn_part_is_done_again(tmp_path):
    store = ResumeStore(tmp_path, "abc")
    store.write("part", {"a": torch.ones(100)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    assert store.read("part") is None
    assert "part" not in store


def test_without_a_folder_nothing_is_kept():
    store = ResumeStore()
    store.write("part", {"a": torch.ones(1)})
    assert store.read("part") is None and "part" not in store
    store.remove()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltaMixError, match="checkpoint_dir"):
        ResumeStore(tmp_path / "file" / "work")


def test_the_folder_is_not_written_into_the_repo(pair, tmp_path):
    config = DeltaMixConfig(base_model="org/base", checkpoint_dir=tmp_path)
    assert "checkpoint_dir" not in config.to_dict()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(pair, tmp_path):
    """SIGKILL, through the command line; jobs follow one another until 20 kills have hit."""
    source = pair("llama_tied")
    seed = random.Random(0)

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "deltamix_hf", "compress", str(source.tuned)]
        command += ["--base", str(source.base), "--output", str(output), "--ratio", "0.25"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - began
    expected = snapshot(tmp_path / "whole")
    kills = jobs = 0
    while kills < 20:
        output, jobs = tmp_path / f"job{jobs}", jobs + 1
        while True:
            process = start(output)
            try:
                # Kills come later than importing takes, or none would ever end.
                code = process.wait(seed.uniform(0.3, 1.0) * duration if kills < 20 else None)
                assert code == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                if output.exists() and not output.with_name(f".{output.name}.unfinished").exists():
                    break  # killed on its way out
        assert snapshot(output) == expected
        assert list(tmp_path.glob(".job*")) == []
    print(f"{kills} kills in {jobs} jobs of {duration:.1f} s")


def test_tensor_list(tmp_path):
    store = ResumeStore(tmp_path / "work", "abc")
    tensor_list = TensorList(store, "hidden")
    for i in range(3):
        tensor_list.append(torch.full((2, i), i))
    tensor_list[1] = torch.ones(5)
    again = TensorList(store, "hidden")  # another process
    assert len(again) == len(tensor_list) == 3
    assert [tuple(again[i].shape) for i in range(3)] == [(2, 0), (5,), (2, 2)]
    assert torch.equal(again[-1], torch.full((2, 2), 2))
    with pytest.raises(IndexError):
        tensor_list[3]
    assert len(TensorList(store, "other")) == 0
    again.clear()
    assert len(TensorList(store, "hidden")) == 0
    with pytest.raises(DeltaMixError, match="was changed while it was in use"):
        tensor_list[0]


def test_only_what_the_job_wrote_is_removed(tmp_path):
    mine, other = ResumeStore(tmp_path, "a" * 24), ResumeStore(tmp_path, "b" * 24)
    for store in (mine, mine.of(3), other):
        store.write("matrix x", {"a": torch.ones(3)})
        store.write("level 1", {"a": torch.ones(3)})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    mine.remove()
    assert len(list(tmp_path.glob("*.part.safetensors"))) == 2
    assert other.read("matrix x") is not None and (tmp_path / "notes.txt").exists()
    other.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "thesis"]


def test_parts_are_removed_all_or_none(tmp_path, monkeypatch):
    """A job that finds some of them would wait for the others, or miss them."""
    store = ResumeStore(tmp_path / "work", "a" * 24)
    for part in ("matrix x", "level 1", "level 2"):
        store.write(part, {"a": torch.ones(3)})
    ResumeStore(tmp_path / "work", "b" * 24).write("matrix x", {"a": torch.ones(3)})
    unlink = Path.unlink

    def crashes(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crashes)
        with pytest.raises(Crash):
            store.remove()
    assert len(list(store._files())) == 2
    again = ResumeStore(tmp_path / "work", "a" * 24)
    again.drop_damaged()
    assert [path.name[0] for path in (tmp_path / "work").iterdir()] == ["b"]


def zeroed(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    start = len(content) - int(share * len(content))
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", ["matrix x", "level 1 of batch 0"])
def test_damaged_parts_are_done_again(tmp_path, name, share, caplog):
    store = ResumeStore(tmp_path, "a" * 24)
    for part in ("matrix x", "matrix y", "level 1 of batch 0", "level 2 of batch 0"):
        store.write(part, {"a": torch.arange(999.0), "b": torch.ones(2)}, [part])
    store.drop_damaged()
    assert name in store
    zeroed(store._path(name), share)
    store.drop_damaged()
    assert store._path(name).name in caplog.text
    assert "matrix y" in store and name not in store
    assert ("matrix x" in store) is (name != "matrix x")
    assert ("level 2 of batch 0" in store) is (name == "matrix x")


def test_a_job_with_any_damaged_part_ends_with_the_same_bytes(pair, tmp_path):
    source, options = pair("llama_tied"), METHODS["deltamix-kl"]
    compress(source, tmp_path / "whole", None, method="deltamix-kl", **options)
    work = tmp_path / "work"
    source.compress(checkpoint_dir=work, method="deltamix-kl", **options)  # never saved
    parts = sorted(work.iterdir())
    kept = {path: path.read_bytes() for path in parts}
    for part in parts[:: max(1, len(parts) // 4)]:
        zeroed(part, 0.6)
        compress(source, tmp_path / "out", work, method="deltamix-kl", **options)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        work.mkdir()
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.parametrize("damaged", ["-run", "-one"])
def test_a_streamed_job_that_was_all_but_done(pair, tmp_path, monkeypatch, damaged):
    """What the passes left is dropped with a damaged part: they are run again."""
    source, work = pair("llama_tied"), tmp_path / "work"

    def stream(output: Path) -> None:
        options = METHODS["deltamix-kl"] | {"method": "deltamix-kl", "checkpoint_dir": work}
        compress_streaming(source.tuned, output, source.config(**options))

    with monkeypatch.context() as patch:
        patch.setattr(ResumeStore, "remove", lambda self: None)
        stream(tmp_path / "whole")
    zeroed(next(path for path in sorted(work.iterdir()) if damaged in path.name), 0.6)
    stream(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
