"""Many fine-tunes on one base: memory of N tenants, and time of a batch spread over them.

    python examples/multi_tenant.py     # once: trains and compresses the three fine-tunes
    python examples/bench_tenants.py    # writes docs/results/tenants.json and tenants.md

Tenants are the three deltas in turn under names of their own; each is read and held anew. Memory is
the resident set of a fresh process once a batch has used every tenant, less that of the same
process before it loaded a model; weights in bfloat16. Times are of decoding on this CPU in float32;
the ways take turns in every round, and none is printed unless their logits agree.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
import transformers
from multi_tenant import PAIRS
from pairs.pair import cache_root
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel

import deltamix_hf

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TENANTS = (1, 2, 4, 8, 16, 32)
SPREADS = (1, 4, 16)  # tenants of a batch
ROWS, PROMPT, STEPS = 16, 8, 8
TOLERANCE = 1e-4  # of the largest logit


def base() -> Path:
    return cache_root() / "smollm2-base"


def repos(count: int) -> dict[str, Path]:
    """Name -> delta repo of `count` tenants."""
    found = [cache_root() / "deltas" / p / "1of16" / "deltamix-kl" for p in PAIRS.values()]
    return {f"tenant{i}": found[i % len(found)] for i in range(count)}


def with_tenants(count: int, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=dtype)
    for name, repo in repos(count).items():
        model.load_delta(repo, name)
    return model


def dense(count: int, dtype: torch.dtype) -> list[PreTrainedModel]:
    """A whole model for every tenant."""
    return [
        AutoModelForCausalLM.from_pretrained(repo, dtype=dtype).dequantize()
        for repo in repos(count).values()
    ]


def resident() -> int:
    """Bytes of this process in memory, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def measure_memory(way: str, count: int) -> dict:
    """Runs in a process of its own."""
    transformers.logging.disable_progress_bar()
    ids = torch.arange(4)[None] + 100
    torch.nn.functional.linear(torch.ones(4, 4), torch.ones(4, 4))  # what torch sets up for itself
    before = resident()
    if way == "base":
        model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.bfloat16)
        model(ids)
    elif way == "deltas":
        model = with_tenants(count, torch.bfloat16)
        model(ids.expand(count, -1), delta_names=list(model.list_deltas()))
    else:
        models = dense(count, torch.bfloat16)
        for model in models:
            model(ids)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": resident() - before, "weights": weights}


def memory_table() -> list[dict]:
    def child(way: str, count: int) -> dict:
        command = [sys.executable, __file__, "--memory", way, str(count)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(out.splitlines()[-1])

    plain = child("base", 0)
    rows = [{"tenants": 0, "deltas": plain["bytes"], "weights": plain["weights"]}]
    for count in track(TENANTS, "memory"):
        found = {way: child(way, count)["bytes"] for way in ("deltas", "dense")}
        rows.append({"tenants": count, **found})
    return rows


@torch.no_grad()
def decode(model: PreTrainedModel, rows: int, **names) -> torch.Tensor:
    """Logits of the last of `STEPS` tokens decoded for `rows` equal prompts."""
    prompt = (torch.arange(PROMPT) + 100).expand(rows, -1)
    out = model(prompt, use_cache=True, **names)
    for _ in range(STEPS):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, past_key_values=out.past_key_values, use_cache=True, **names)
    return out.logits[:, -1]


def time_table(rounds: int) -> list[dict]:
    """Seconds of every way to decode a batch of `ROWS` rows."""
    transformers.logging.disable_progress_bar()
    most = max(SPREADS)
    model = with_tenants(most, torch.float32)
    whole = dense(len(PAIRS), torch.float32)  # tenant i's weights are those of i % 3
    names = list(model.list_deltas())
    slot = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)

    def together(count: int) -> torch.Tensor:
        return decode(model, ROWS, delta_names=[names[i * count // ROWS] for i in range(ROWS)])

    def in_turn(count: int) -> torch.Tensor:
        return torch.cat([decode(whole[i % 3], ROWS // count) for i in range(count)])

    def swapped(count: int) -> torch.Tensor:
        """One model in memory; each tenant's weights are copied into it from the other ones."""
        parts = []
        for i in range(count):
            slot.load_state_dict(whole[i % 3].state_dict())
            parts.append(decode(slot, ROWS // count))
        return torch.cat(parts)

    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "base and deltas": together,
        "dense models in turn, all in memory": in_turn,
        "dense models in turn, one in memory": swapped,
    }
    for count in SPREADS:
        expected = in_turn(count)
        error = float((together(count) - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{count} tenants: logits differ by {error:.2g}; nothing is timed")
    times: dict[tuple[str, int], list[float]] = {}
    plain: list[float] = []
    for _ in track(range(rounds), "time"):
        started = time.perf_counter()
        decode(model, ROWS, delta_names="__base__")
        plain.append(time.perf_counter() - started)
        for count in SPREADS:
            for way, run in ways.items():
                started = time.perf_counter()
                run(count)
                times.setdefault((way, count), []).append(time.perf_counter() - started)
    rows = [{"way": "base alone", "tenants": 0, "seconds": plain, "ratios": [1.0] * rounds}]
    for (way, count), spent in times.items():
        ratios = [a / b for a, b in zip(spent, plain, strict=True)]
        rows.append({"way": way, "tenants": count, "seconds": spent, "ratios": ratios})
    return rows


def report(found: dict) -> str:
    """The tables as Markdown."""
    memory, times = (found[part]["rows"] for part in ("memory", "time"))
    unit = memory[0]["deltas"]
    lines = ["# Many tenants on one base", ""]
    lines += ["Generated by `examples/bench_tenants.py`; do not edit.", ""]
    lines += [f"SmolLM2-135M, deltas at 1/16. {found['machine']}; {found['versions']}.", ""]
    lines += [
        "## Memory",
        "",
        "Process memory in bfloat16, MB and as a multiple of the base's, which ",
    ]
    lines += [
        f"is measured the same way ({memory[0]['weights'] / 1e6:.0f} MB of it are weights).",
        "",
    ]
    lines += [
        "| tenants | base + deltas | | dense models | |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in memory:
        cells = [str(row["tenants"])]
        for way in ("deltas", "dense"):
            size = row.get(way)
            cells += ["", ""] if size is None else [f"{size / 1e6:.0f}", f"{size / unit:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Time", "", f"{ROWS} rows, {STEPS} tokens each after a prompt of {PROMPT}, "]
    lines += ["float32; medians, and the ratio to the base alone in the same round.", ""]
    lines += [
        "| | tenants | s | / base alone | least to most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in times:
        ratios, spent = row["ratios"], statistics.median(row["seconds"])
        lines.append(
            f"| {row['way']} | {row['tenants']} | {spent:.2f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("memory", "time"), help="only this; default both")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        way, count = options.memory
        print(json.dumps(measure_memory(way, int(count))))
        return
    file = RESULTS / "tenants.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"deltamix_hf {deltamix_hf.__version__}",
    }
    if options.part != "time":
        found["memory"] = {"date": str(date.today()), "rows": memory_table()}
        file.write_text(json.dumps(found, indent=1) + "\n")
    if options.part != "memory":
        found["time"] = {"date": str(date.today()), "rows": time_table(options.rounds)}
        file.write_text(json.dumps(found, indent=1) + "\n")
    if not {"memory", "time"} <= found.keys():
        return
    text = report(found)
    (RESULTS / "tenants.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
