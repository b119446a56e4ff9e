"""Compress one pair one way, load the result back from disk and say how good it is."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_quality.plan import DEFAULT_QUESTIONS, QUESTIONS, Run
from bench_quality.texts import calibration_data
from pairs.answers import exact_match
from pairs.pair import Pair
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from deltamix_hf import METHODS, DeltaMixConfig
from deltamix_hf.evaluation.quality import Batch, compare, gain_kept, reference_logits
from deltamix_hf.nn.experts import compressed_shapes
from deltamix_hf.nn.layers import delta_modules, packed_shapes
from deltamix_hf.storage.sizes import size_report

KINDS = ("payload", "scales", "metadata", "overlay")


class Judge:
    """A pair's held-out rows, and what the fine-tune says on them (computed once)."""

    def __init__(self, pair: Pair, questions: int | None = None, exact: bool = False):
        self.pair = pair
        self.questions = questions or QUESTIONS.get(pair.name, DEFAULT_QUESTIONS)
        self.encoder = pair.rows("heldout", 1)[0]["answer"] is None
        self.exact = exact and not self.encoder and pair.info.get("exact_match", True)

    def load(self, folder: Path, **kwargs: Any) -> PreTrainedModel:
        auto = AutoModelForSequenceClassification if self.encoder else AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.float32, **kwargs)

    @cached_property
    def finetuned(self) -> PreTrainedModel:
        return self.load(self.pair.finetuned)

    @cached_property
    def batches(self) -> list[Batch]:
        rows = 64 if self.encoder else 32  # logits of every token may take much memory
        return list(self.pair.batches("heldout", self.questions, batch_size=rows))

    @cached_property
    def reference(self) -> list[Tensor]:
        return reference_logits(self.load(self.pair.finetuned), self.batches)

    def figures(self, model: PreTrainedModel) -> dict[str, float]:
        """KL to the fine-tune and NLL in nats per token, shares from 0 to 1."""
        found = compare(self.reference, model, self.batches)
        figures = {
            "kl": found.kl,
            "nll": found.nll,
            "perplexity": found.perplexity,
            "accuracy": found.accuracy,
            "agreement": found.agreement,
            "tokens": found.tokens,
        }
        if self.exact:
            questions = self.pair.questions(self.questions)
            figures["exact_match"] = exact_match(model, self.pair.tokenizer(), *questions)
        return figures

    def ends(self) -> dict[str, Any]:
        """Figures of the base and of the fine-tune."""
        return {
            "questions": len(self.pair.rows("heldout", self.questions)),
            "exact": self.exact,
            "base": self.figures(self.load(self.pair.base)),
            "finetuned": self.figures(self.finetuned),
        }


def compress(run: Run, judge: Judge) -> dict[str, Any]:
    """One of our methods: compress, save, load back, judge. Bytes are the files'."""
    pair = judge.pair
    config = DeltaMixConfig(
        base_model=str(pair.base),
        method=replace(METHODS[run.method], **run.switches),
        ratio=None if run.share is None else 1 / run.share,
        calibration=calibration_data(pair, run.calibration),
        num_samples=run.samples,
        seed=run.seed,
    )
    clock = [time.perf_counter()]
    with TemporaryDirectory() as folder:
        model: Any = judge.load(pair.finetuned, quantization_config=config)
        clock.append(time.perf_counter())
        model.save_pretrained(folder)
        clock.append(time.perf_counter())
        stages = dict(model.hf_quantizer.seconds)
        source = model.config.quantization_config.calibration_source
        del model
        delta = judge.load(Path(folder))
        clock.append(time.perf_counter())
        size, types = size_report(folder, compressed_shapes(delta)), layer_types(delta)
        # the same products, added up beforehand: twice as fast where nothing runs packed codes
        figures = judge.figures(delta.dequantize())
        clock.append(time.perf_counter())
    total, saved, loaded, validation_kl = (b - a for a, b in pairwise(clock))
    return {
        "figures": figures,
        "bytes": {kind: getattr(size, kind) for kind in (*KINDS, "total", "reference")},
        "ratio": size.ratio,
        "seconds": {"total": total, "save": saved, "load": loaded, "judge": validation_kl},
        "stages": stages,
        "types": types,
        "calibration_source": source,
    }


def kept(figures: dict[str, Any], base: dict[str, Any], finetuned: dict[str, Any]) -> dict:
    """Shares of what the fine-tune gained over the base that are kept, by figure.

    "kl" is for models without labels: 1 − KL / KL of the base.
    """
    shares = {"kl": 1 - figures["kl"] / base["kl"]}
    for name in ("nll", "accuracy", "exact_match"):
        start, end, value = (found.get(name) for found in (base, finetuned, figures))
        if start is not None and end is not None and value is not None and start != end:
            shares[name] = gain_kept(start, end, value)
    return shares


def layer_types(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Widths and ranks by type of layer: what is behind the block number in a module's name.

    `rank` and `full_rank` are means over the matrices, `v_bits` and `u_bits` means over the ranks;
    `widths` counts ranks by "V width/U width".
    """
    modules, packed = delta_modules(model), packed_shapes(model)
    found: dict[str, dict[str, Any]] = {}
    for name, (m, n) in packed.items():
        inside = re.split(r"\.\d+\.", name)[1:]
        kind = inside[-1] if inside else name.split(".")[-1]
        entry = found.setdefault(kind, {"matrices": 0, "full_rank": 0, "widths": Counter()})
        entry["matrices"] += 1
        entry["full_rank"] += min(m, n)
        for count, v_bits, u_bits in modules[name].packed().runs:
            entry["widths"][v_bits, u_bits] += count
    for entry in found.values():
        widths = entry["widths"]
        ranks = sum(widths.values())
        entry["full_rank"] /= entry["matrices"]
        entry["rank"] = ranks / entry["matrices"]
        for side, key in enumerate(("v_bits", "u_bits")):
            bits = sum(pair[side] * count for pair, count in widths.items())
            entry[key] = bits / ranks if ranks else 0.0
        entry["widths"] = {f"{v}/{u}": count for (v, u), count in sorted(widths.items())}
    return found
