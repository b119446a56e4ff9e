"""Times of GPU work by replays of a CUDA graph; on a CPU, of one plain call, for dry runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPEATS = 20  # replays that are timed


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_graph(run: Callable[[int], object], count: int, loops: int = 1) -> list[float]:
    """Seconds a call of run(0) to run(count - 1), one figure a replay of one graph of them all.

    The graph holds them `loops` times: the gap between two replays is shared by more calls.
    """
    if DEVICE.type == "cpu":
        return [_seconds(lambda: [run(i) for i in range(count)]) / count]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(count):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for _ in range(loops) for i in range(count)]
    found = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / count / loops)
    del kept
    return found[3:]


def time_eager(run: Callable[[], object], times: int = 5) -> list[float]:
    """Seconds of a call and of what it leaves on the device, after a first one."""
    found = []
    for _ in range(times + 1):
        synchronize()
        found.append(_seconds(lambda: (run(), synchronize())))
    return found[1:]


def time_host(run: Callable[[], object], calls: int = 200) -> float:
    """Seconds of the host's time a call, without waiting for the device; the least of 5."""
    run()
    synchronize()
    found = []
    for _ in range(5):
        found.append(_seconds(lambda: [run() for _ in range(calls)]) / calls)
        synchronize()
    return min(found)


def copy_rate(size: int) -> float:
    """Bytes/s read and written by a copy of `size` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(time_graph(lambda _: target.copy_(source), 2))


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, in microseconds."""
    us = [1e6 * s for s in seconds]
    median = statistics.median(us)
    return {"us": round(median, 2), "least": round(min(us), 2), "most": round(max(us), 2)}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
