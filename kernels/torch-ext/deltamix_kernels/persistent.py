"""Tensors that outlive the call that makes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def persistent(device: torch.device, make: Callable[[], T]) -> T:
    """Return `make()`, run in another thread where `device` is a GPU.

    While a compiled model warms up for a CUDA graph, torch counts what the calling thread allocates
    as the graph's own, and refuses to go on if some of it is still alive afterwards.

    Raises:
        RuntimeError: a CUDA graph is being recorded, which must not allocate what it reads.
    """
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run the model once, on as many rows, before a CUDA graph is recorded")
    torch.cuda.current_stream(device).synchronize()  # what `make` reads may still be on its way

    def run() -> T:
        with torch.cuda.device(device), torch.no_grad():
            made = make()
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
