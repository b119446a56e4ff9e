"""Several processes make the delta repo that one makes, but for the order of sums."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import stream_worker
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pairs import logits, relative, snapshot

from deltamix_hf import DeltaMixError
from deltamix_hf.cli.compress import compress
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.jobs.resume_store import ResumeStore
from deltamix_hf.jobs.workers import ALONE, Workers


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_every_batch_is_somebodys(count, size):
    shares = [list(Workers(rank, size).share(count)) for rank in range(size)]
    assert [b for share in shares for b in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(shapes=st.dictionaries(st.text("ab", min_size=1), SIDES), size=st.integers(1, 4))
def test_matrices_are_shared_by_cost(shapes, size):
    owners = {rank: Workers(rank, size).owners(shapes) for rank in range(size)}
    found, costs = owners[0], {name: m * n * min(m, n) for name, (m, n) in shapes.items()}
    assert all(other == found for other in owners.values())
    assert found.keys() == shapes.keys() and set(found.values()) <= set(range(size))
    loads = [sum(costs[n] for n in costs if found[n] == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(costs.values(), default=0)  # no fairer by one matrix


def test_launchers_say_who_is_who(monkeypatch):
    assert Workers.launched() == Workers(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Workers.launched() == Workers(2, 3)


def test_workers_that_were_not_started_together(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeltaMixError, match=r"the 2 workers cannot find each other: .*torchrun"):
        Workers.launched().add_up(torch.ones(1))


def test_waiting_for_another(tmp_path):
    store, two = ResumeStore(tmp_path, "a"), Workers(1, 2)
    threading.Timer(0.2, store.write, ("part", {})).start()
    started = time.monotonic()
    two.wait(store, "part")
    assert 0.1 < time.monotonic() - started < 5
    with pytest.raises(DeltaMixError, match="another worker has not finished 'other'"):
        Workers(1, 2, patience=0.1).wait(store, "other")


def launch(processes: int, *arguments: object) -> subprocess.Popen:
    """`stream_worker.py` by torchrun in that many processes of one thread."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, stream_worker.__file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> None:
    _, error = job.communicate(timeout=300)
    assert job.returncode == 0, error


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_delta(pair, tmp_path, processes):
    """The same bytes each time, and what one process writes but for draws and the order of sums."""
    source = pair("llama_tied")
    names = ("one", "many", "again")
    one, *many = (tmp_path / name for name in names)
    stream_worker.main(source.tuned, source.base, one)
    finish(launch(processes, source.tuned, source.base, *many))
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    tuned, *made = (source.load(folder) for folder in (source.tuned, one, many[0]))
    kls = [m.config.quantization_config.measured["kl"] for m in made]
    far = [relative(logits(m), logits(tuned)) for m in made]
    assert kls[1] == pytest.approx(kls[0], rel=0.1)
    assert far[1] == pytest.approx(far[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [10, 40, 70])
def test_killed_and_started_again_they_write_the_same(pair, tmp_path, parts):
    source, work = pair("llama_tied"), tmp_path / ".killed.unfinished"
    job = launch(2, source.tuned, source.base, tmp_path / "killed")
    while job.poll() is None and len(list(work.glob("*.part.safetensors"))) < parts:
        time.sleep(0.01)
    assert job.poll() is None, "it ended before it could be killed"
    for process in (*psutil.Process(job.pid).children(recursive=True), job):
        process.kill()
    job.communicate()
    for name in ("killed", "whole"):
        finish(launch(2, source.tuned, source.base, tmp_path / name))
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_only_what_can_be_shared_is(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = pair("llama")
    with pytest.raises(DeltaMixError, match="method 'delta-come' hands bytes on"):
        compress_streaming(source.tuned, tmp_path / "out", source.config(method="delta-come"))
    with pytest.raises(DeltaMixError, match="with --low-memory only"):
        compress(str(source.tuned), str(source.base), tmp_path / "out")


def test_a_process_alone_waits_for_nobody(tmp_path):
    """Its checkpoint_dir was emptied meanwhile: it would wait for a day."""
    with pytest.raises(DeltaMixError, match="was changed while it was in use"):
        ALONE.wait(ResumeStore(tmp_path, "a" * 24), "level 1")
