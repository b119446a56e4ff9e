"""A packed model on a CPU against the dense fine-tune: decoding, prefill, memory, busy cores.

    python kernels/benchmarks/cpu_decode.py DELTA_REPO FINE_TUNE [--threads 1 2] [--rounds 7]

`make demo` leaves both in ~/.cache/deltamix_hf/pairs. The ways take turns, one run of each in every
round, so that a busy machine slows all alike; ratios are of the same round. Logits of the packed
model are checked first, by either way, against its own dequantized weights in float32. The last
table has the packed products alone while a loop keeps every core busy.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import deltamix_hf
from deltamix_hf.ops.dispatch import NATIVE, REFERENCE, VARIABLE

TOLERANCE = 1e-4  # of the largest logit
PREFILL = 256
WAYS = {"dense": "", "native": NATIVE, "look-up": REFERENCE, "merged": ""}
BUSY = "while True: pass"


@torch.no_grad()
def decode_seconds(model: PreTrainedModel, rows: int, tokens: int) -> float:
    """Of decoding `tokens` tokens one by one after a prompt of 8, which is not counted."""
    out = model((torch.arange(8) + 100).expand(rows, -1), use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, past_key_values=out.past_key_values, use_cache=True)
    return (time.perf_counter() - started) / tokens


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel) -> float:
    ids = torch.arange(PREFILL)[None] + 100
    started = time.perf_counter()
    model(ids, use_cache=True)
    return time.perf_counter() - started


@torch.no_grad()
def check(models: dict[str, PreTrainedModel]) -> None:
    for length in 8, PREFILL:
        ids = torch.arange(length)[None] + 100
        expected = models["merged"](ids).logits
        for way in "native", "look-up":
            with_kernel(WAYS[way])
            found = models[way](ids).logits
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{way} and merged logits differ by {error:.2g}: nothing is timed")
            print(f"{way} and merged logits of {length} tokens agree to {error:.1g} of the largest")


def with_kernel(name: str) -> None:
    os.environ.pop(VARIABLE, None)
    if name:
        os.environ[VARIABLE] = name


def compare(
    models: dict[str, PreTrainedModel], rounds: int, seconds: Callable[[PreTrainedModel], float]
) -> dict[str, list[float]]:
    """Seconds of every way in each round, the first of which is not counted."""
    found: dict[str, list[float]] = {way: [] for way in models}
    for number in range(rounds + 1):
        for way, model in models.items():
            with_kernel(WAYS[way])
            spent = seconds(model)
            if number:
                found[way].append(spent)
    return found


def report(title: str, found: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    for way, spent in found.items():
        ratios = [a / b for a, b in zip(spent, found["dense"], strict=True)]
        print(
            f"{way:8s} {1e3 * statistics.median(spent):8.1f} ms, "
            f"{statistics.median(ratios):.2f} x dense ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def peak_memory(delta: str, way: str) -> None:
    """Print what a fresh process needed to load the delta and to run it; MB."""
    with_kernel(WAYS[way])
    model = AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32)
    prefill_seconds(model)
    decode_seconds(model, 16, 4)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def busy_cores(models: dict[str, PreTrainedModel], rounds: int) -> None:
    """The packed products of all layers at one row, idle and with a loop on every core."""
    layers = [m for m in models["native"].modules() if isinstance(m, deltamix_hf.DeltaLinear)]
    inputs = [torch.randn(1, layer.in_features) for layer in layers]
    with_kernel(NATIVE)

    @torch.no_grad()
    def products() -> float:
        started = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer.added(layer.packed(), x, torch.float32)
        return time.perf_counter() - started

    idle = statistics.median(products() for _ in range(5 * rounds))
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1)
        busy = statistics.median(products() for _ in range(5 * rounds))
    finally:
        for loop in loops:
            loop.kill()
    print(f"products alone: {1e3 * idle:.1f} ms, with a loop on every core {busy / idle:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("delta")
    parser.add_argument("finetuned")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.memory:
        peak_memory(options.delta, options.memory)
        return
    load = AutoModelForCausalLM.from_pretrained
    packed = load(options.delta, dtype=torch.float32)
    models = {
        "dense": load(options.finetuned, dtype=torch.float32),
        "native": packed,
        "look-up": packed,
        "merged": load(options.delta, dtype=torch.float32),
    }
    deltamix_hf.cache_merged(models["merged"])
    check(models)
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} threads, torch {torch.__version__}, medians of {options.rounds} rounds")
        for rows in 1, 4, 16:
            seconds = partial(decode_seconds, rows=rows, tokens=options.tokens)
            report(f"decoding, {rows} rows, a step", compare(models, options.rounds, seconds))
        report(f"prefill of {PREFILL} tokens", compare(models, options.rounds, prefill_seconds))
        busy_cores(models, options.rounds)
    print()
    for way in "native", "look-up":
        command = [sys.executable, __file__, options.delta, options.finetuned, "--memory", way]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(f"peak memory of a process, {way}: {float(out.split()[-1]):.0f} MB")


if __name__ == "__main__":
    main()
