"""Times of GPU work by replays of a CUDA graph; on a CPU, of plain calls, for dry runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_graph(run: Callable[[int], object], count: int, repeats: int = 20) -> list[float]:
    """Seconds a call of run(0) to run(count - 1), one figure a replay of one graph of them all."""
    if DEVICE.type == "cpu":
        return [_seconds(lambda: [run(i) for i in range(count)]) / count for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(count):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(count)]
    found = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / count)
    del kept
    return found[3:]


def time_host(run: Callable[[], object], calls: int = 200) -> float:
    """Seconds of the host's time a call, without waiting for the device; the least of 5."""
    run()
    synchronize()
    found = []
    for _ in range(5):
        found.append(_seconds(lambda: [run() for _ in range(calls)]) / calls)
        synchronize()
    return min(found)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, in microseconds."""
    us = [1e6 * s for s in seconds]
    median = statistics.median(us)
    return {"us": round(median, 2), "least": round(min(us), 2), "most": round(max(us), 2)}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
