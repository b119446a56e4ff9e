"""The main job on a real model: shrink a fine-tune to a delta, load it back, ask it questions.

    python examples/demo.py                                       # about ten minutes on two cores
    python examples/demo.py --pair smollm2-mixed --method deltamix --method delta-come

What happens: a real base model (SmolLM2-135M-Instruct, shipped by a PyPI package) is fully
fine-tuned on a task it fails at; `from_pretrained` compresses the fine-tune against its base;
`save_pretrained` writes the delta alone; a fresh process loads it back and judges it on questions
that neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
import transformers
from pairs.answers import exact_match, greedy_answers
from pairs.pair import Pair, cache_root
from real_pairs import build_pair
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamix_hf import DeltaMixConfig
from deltamix_hf.evaluation.quality import compare, gain_kept, reference_logits
from deltamix_hf.method import DEFAULT_METHOD
from deltamix_hf.nn.experts import compressed_shapes
from deltamix_hf.storage.sizes import size_report, weight_files

KINDS = ("payload", "scales", "metadata", "overlay")
console = Console()


def compress(pair: Pair, method: str, ratio: float, folder: Path) -> dict[str, float]:
    """The main job, in two statements; returns seconds by stage."""
    model = AutoModelForCausalLM.from_pretrained(
        pair.finetuned,
        quantization_config=DeltaMixConfig(
            base_model=pair.base, method=method, ratio=ratio, calibration=pair.texts()
        ),
    )
    model.save_pretrained(folder)
    return model.hf_quantizer.seconds


def judge(pair: Pair, deltas: list[Path], questions: int) -> dict:
    """Everything the tables show; runs in a process that has seen no compression."""
    prompts, answers = pair.questions(questions)
    batches = pair.batches("heldout", questions, batch_size=16)
    tokenizer = AutoTokenizer.from_pretrained(deltas[0])  # it travelled with the delta
    reference = None
    rows = {}
    for name in ("fine-tune", "base", *map(str, deltas)):
        source = {"fine-tune": pair.finetuned, "base": pair.base}.get(name, Path(name))
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source)
        loaded = time.perf_counter() - started
        reference = reference or reference_logits(model, batches)
        metrics = compare(reference, model, batches)
        row = {
            "load_seconds": loaded,
            "bytes": sum(file.stat().st_size for file in weight_files(source)),
            "nll": metrics.nll,
            "perplexity": metrics.perplexity,
            "kl": metrics.kl,
            "exact_match": exact_match(model, tokenizer, prompts, answers),
            "answers": greedy_answers(model, tokenizer, prompts[:5]),
        }
        if name not in ("fine-tune", "base"):
            size = size_report(source, compressed_shapes(model))
            config = model.config.quantization_config
            row |= {
                "method": config.method.name,
                "reference_bytes": size.reference,
                "ratio": size.ratio,
                "kinds": {
                    k: getattr(size, k) for k in ("payload", "scales", "metadata", "overlay")
                },
            }
        rows[Path(name).name] = row
    for row in rows.values():
        for metric in ("exact_match", "nll"):
            row[f"{metric}_gain_kept"] = gain_kept(
                rows["base"][metric], rows["fine-tune"][metric], row[metric]
            )
    return {"prompts": prompts[:5], "right": answers[:5], "questions": len(prompts), "rows": rows}


def show(found: dict, ratio: float) -> None:
    """Print the answers side by side, then the figures."""
    rows = found["rows"]
    order = ["base", "fine-tune", *[name for name in rows if name not in ("base", "fine-tune")]]
    answers = Table(title="Same questions, greedy answers")
    for column in ("question", "right", *order):
        answers.add_column(column, overflow="fold")
    for i, prompt in enumerate(found["prompts"]):
        question = prompt.split("user\n")[-1].split("<|im_end|>")[0].strip()
        answers.add_row(question, found["right"][i], *[rows[n]["answers"][i] for n in order])
    console.print(answers)

    table = Table(
        title=f"{found['questions']} held-out questions; promised ratio {ratio:.5f}",
        caption="exact match; perplexity and KL to the fine-tune (nats per token) of the answers; "
        "shares of the fine-tune's gain that are kept",
        box=SIMPLE,
        padding=(0, 0),  # with this, 80 columns are enough
    )
    table.add_column("", no_wrap=True)
    for column in ("MB", "ratio", "exact", "ppl", "KL", "task kept", "NLL kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in order:
        row = rows[name]
        delta = "ratio" in row
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['ratio']:.5f}" if delta else "",
            f"{row['exact_match']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['exact_match_gain_kept']:.1%}" if delta else "",
            f"{row['nll_gain_kept']:.1%}" if delta else "",
        )
    console.print(table)
    for name in order[2:]:
        row = rows[name]
        kinds = ", ".join(f"{kind} {size / 1e6:.3f}" for kind, size in row["kinds"].items())
        console.print(
            f"{name}: {row['bytes']:,} bytes of weight files stand for {row['reference_bytes']:,} "
            f"bytes of bf16 that differ from the base. MB: {kinds}."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2-demo")
    parser.add_argument("--method", action="append", help=f"repeatable; default {DEFAULT_METHOD}")
    parser.add_argument("--ratio", type=Fraction, default=Fraction(1, 16))
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--results", type=Path, help="also write the figures as JSON")
    parser.add_argument("--judge", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    pair = build_pair(options.pair)
    if options.judge:
        print(json.dumps(judge(pair, options.judge, options.questions)))
        return

    folders, seconds, stages = [], {}, {}
    for method in options.method or [DEFAULT_METHOD]:
        share = str(options.ratio).replace("/", "of")
        folder = cache_root() / "deltas" / options.pair / share / method
        console.rule(f"compressing {options.pair} with {method} to {options.ratio}")
        started = time.perf_counter()
        stages[folder.name] = compress(pair, method, float(options.ratio), folder)
        seconds[folder.name] = time.perf_counter() - started
        folders.append(folder)
    console.rule("loading the delta in a fresh process and judging it")
    command = [sys.executable, __file__, "--pair", options.pair]
    command += ["--questions", str(options.questions), "--judge", *map(str, folders)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    show(found, float(options.ratio))
    for name, spent in seconds.items():
        parts = ", ".join(f"{stage} {part:.0f}" for stage, part in stages[name].items())
        console.print(f"{name}: compressed and saved in {spent:.0f} s ({parts})")
    if options.results:
        found |= {
            "pair": options.pair,
            "promised_ratio": float(options.ratio),
            "compress_seconds": seconds,
            "stage_seconds": stages,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
