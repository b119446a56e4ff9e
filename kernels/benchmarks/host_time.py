"""Python's time for the linear layers of a Llama-3-8B block at one row, launches not counted.

    python kernels/benchmarks/host_time.py

On a CPU, with the code that runs on a GPU: kernels are not launched, and matrices are small, since
what the host does depends on their number alone. Prints one JSON line; microseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)
os.environ["DELTAMIX_KERNEL"] = "triton"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
from deltamix_kernels import config
from torch import nn
from triton.runtime import jit

from deltamix_hf.nn.layers import attach
from deltamix_hf.nn.shared_input import link_shared_inputs
from deltamix_hf.ops import dispatch
from deltamix_hf.ops.self_check import random_delta

SIZE = 128
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def block() -> nn.Module:
    """Seven layers with deltas, grouped as in a model."""
    found, random = nn.Module(), torch.Generator().manual_seed(0)
    for name in NAMES:
        layer = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
        attach(layer, random_delta(SIZE, SIZE, random))
        found.add_module(name, layer)
    link_shared_inputs(found)
    return found


def seconds(run: Callable[[], object], times: int = 20) -> float:
    """Median of this thread's own time, which a busy machine changes little."""
    found = []
    for _ in range(times):
        started = time.thread_time()
        for _ in range(20):
            run()
        found.append((time.thread_time() - started) / 20)
    return statistics.median(found)


def main() -> None:
    launched: list[str] = []
    jit.JITFunction.run = lambda self, *a, **k: launched.append(self.fn.__name__)
    dispatch._runs_triton = lambda device: True
    config.read = lambda name, default=config.read: default("default")
    layers = block()
    x, gated = (torch.randn(1, 1, SIZE, dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        other = x.clone()
        for name in NAMES:
            layer = getattr(layers, name)
            layer({"o_proj": gated, "gate_proj": other, "up_proj": other}.get(name, x))

    with torch.no_grad():
        run()  # makes the plans
        launched.clear()
        run()
        launches = len(launched)
        spent = seconds(run)
        plain = [nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16) for _ in NAMES]
        base = seconds(lambda: [layer(x) for layer in plain])
        clone = seconds(lambda: x.clone())
    print(
        json.dumps(
            {
                "layers": len(NAMES),
                "us": round(1e6 * (spent - clone), 1),
                "us of 7 nn.Linear": round(1e6 * base, 1),
                "launches": launches,
            }
        )
    )


if __name__ == "__main__":
    main()
