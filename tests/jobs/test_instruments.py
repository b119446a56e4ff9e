"""Seconds by stage, and freed memory that goes back to the system."""

from __future__ import annotations

import sys
import time

import psutil
import pytest
import torch

from deltamix_hf.jobs.instruments import Stopwatch, trim_heap


def test_a_moment_belongs_to_the_innermost_stage(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 10.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.stage("outer"), watch.stage("inner"):  # 0 to 7, 1 to 3
        pass
    with pytest.raises(ZeroDivisionError), watch.stage("inner"):  # 10 to 14
        _ = 1 / 0
    assert watch.seconds == {"outer": 1.0 + 4.0, "inner": 2.0 + 4.0}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_goes_back():
    """200 MB in blocks that the allocator would keep, below one that is still in use."""
    large = torch.ones(31 << 20, dtype=torch.uint8)
    del large  # freed once, blocks of this size are kept
    process = psutil.Process()
    before = process.memory_info().rss
    blocks = [torch.full((1 << 18,), float(i)) for i in range(200)]
    kept = torch.full((1 << 18,), 7.0)
    held = process.memory_info().rss
    del blocks
    trim_heap()
    assert held - before > 150e6 and process.memory_info().rss - before < 50e6
    assert float(kept.mean()) == 7.0
