"""Decode on a CPU: the packed delta and its cached merged weights against the dense fine-tune.

    python kernels/benchmarks/cpu_decode.py DELTA_REPO FINE_TUNE [--tokens 16] [--rounds 7]

`make demo` leaves both in ~/.cache/deltamix_hf/pairs. The three take turns, one run of greedy
decoding each in every round, so that a busy machine slows all alike; ratios are of the same round.
Logits of the packed model are checked first, against its own dequantized weights in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import deltamix_hf

TOLERANCE = 1e-4  # of the largest logit


def seconds(model: PreTrainedModel, tokens: int) -> float:
    """Of decoding `tokens` tokens one by one after a prompt of 8, which is not counted."""
    prompt = torch.arange(8)[None] + 100
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        started = time.perf_counter()
        for _ in range(tokens):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - started


@torch.no_grad()
def check(packed: PreTrainedModel, merged: PreTrainedModel) -> None:
    ids = torch.arange(8)[None] + 100
    found, expected = packed(ids).logits, merged(ids).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"packed and merged logits differ by {error:.2g}; nothing is timed")
    print(f"packed and merged logits agree to {error:.1g} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("delta")
    parser.add_argument("finetuned")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable_progress_bar()
    load = AutoModelForCausalLM.from_pretrained
    models = {
        "dense": load(options.finetuned, dtype=torch.float32),
        "packed": load(options.delta, dtype=torch.float32),
        "merged": load(options.delta, dtype=torch.float32),
    }
    deltamix_hf.cache_merged(models["merged"])
    check(models["packed"], models["merged"])
    rounds = []
    for _ in range(options.rounds + 1):
        rounds.append({name: seconds(model, options.tokens) for name, model in models.items()})
    print(f"one token at a time, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in models:
        ratios = [found[name] / found["dense"] for found in rounds[1:]]
        each = statistics.median(found[name] for found in rounds[1:]) / options.tokens
        print(
            f"{name:7s} {1e3 * each:7.1f} ms a token, {statistics.median(ratios):.2f} x dense "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
