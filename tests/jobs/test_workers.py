"""Several processes make the delta repo that one makes, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pairs import snapshot

from deltamix_hf import DeltaMixError
from deltamix_hf.cli.compress import compress
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.jobs import workers
from deltamix_hf.jobs.resume_store import ResumeStore
from deltamix_hf.jobs.workers import Workers


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_every_batch_is_somebodys(count, size):
    shares = [list(Workers(rank, size).share(count)) for rank in range(size)]
    assert [b for share in shares for b in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(costs=st.dictionaries(st.text("ab", min_size=1), st.floats(0.1, 9)), size=st.integers(1, 4))
def test_matrices_are_shared_by_cost(costs, size):
    owners = {rank: Workers(rank, size).owners(costs) for rank in range(size)}
    found = owners[0]
    assert all(other == found for other in owners.values())
    assert found.keys() == costs.keys() and set(found.values()) <= set(range(size))
    loads = [sum(costs[n] for n in costs if found[n] == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(costs.values(), default=0)  # no fairer by one matrix


def test_launchers_say_who_is_who(monkeypatch):
    assert Workers.launched() == Workers(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Workers.launched() == Workers(2, 3) and Workers.launched().last


def test_workers_that_were_not_started_together(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeltaMixError, match=r"the 2 workers cannot find each other: .*torchrun"):
        Workers.launched().show(torch.ones(1), 1)


def test_waiting_for_another(tmp_path, monkeypatch):
    store, two = ResumeStore(tmp_path, "a"), Workers(1, 2)
    threading.Timer(0.2, store.write, ("part", {})).start()
    started = time.monotonic()
    two.wait(store, "part")
    assert 0.1 < time.monotonic() - started < 5
    monkeypatch.setattr(workers, "PATIENCE", 0.1)
    with pytest.raises(DeltaMixError, match="another worker has not finished 'other'"):
        two.wait(store, "other")


def launch(processes: int, *arguments: object) -> subprocess.Popen:
    """`stream_worker.py` by torchrun in that many processes of one thread."""
    script = Path(__file__).parents[1] / "helpers" / "stream_worker.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_bytes_of_one(pair, tmp_path, processes):
    source, sizes = pair("llama_tied"), (1, processes)
    launched = [launch(n, source.tuned, source.base, tmp_path / str(n)) for n in sizes]
    for job in launched:
        _, error = job.communicate(timeout=300)
        assert job.returncode == 0, error
    assert snapshot(tmp_path / str(processes)) == snapshot(tmp_path / "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", str(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [10, 40, 70])
def test_killed_and_started_again_they_write_the_same(pair, tmp_path, parts):
    source, work = pair("llama_tied"), tmp_path / ".2.unfinished"
    job = launch(2, source.tuned, source.base, tmp_path / "2")
    while job.poll() is None and len(list(work.glob("*.part.safetensors"))) < parts:
        time.sleep(0.01)
    assert job.poll() is None, "it ended before it could be killed"
    for process in (*psutil.Process(job.pid).children(recursive=True), job):
        process.kill()
    job.communicate()
    for processes in (2, 1):
        job = launch(processes, source.tuned, source.base, tmp_path / str(processes))
        _, error = job.communicate(timeout=300)
        assert job.returncode == 0, error
    assert snapshot(tmp_path / "2") == snapshot(tmp_path / "1")


def test_only_what_can_be_shared_is(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = pair("llama")
    with pytest.raises(DeltaMixError, match="method 'delta-come' hands bytes on"):
        compress_streaming(source.tuned, tmp_path / "out", source.config(method="delta-come"))
    with pytest.raises(DeltaMixError, match="with --low-memory only"):
        compress(str(source.tuned), str(source.base), tmp_path / "out")
