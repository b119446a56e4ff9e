from __future__ import annotations

import time

import pytest

from deltamix_hf.jobs.instruments import Stopwatch


def test_a_moment_belongs_to_the_innermost_stage(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 10.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.stage("outer"), watch.stage("inner"):  # 0 to 7, 1 to 3
        pass
    with pytest.raises(ZeroDivisionError), watch.stage("inner"):  # 10 to 14
        _ = 1 / 0
    assert watch.seconds == {"outer": 1.0 + 4.0, "inner": 2.0 + 4.0}
