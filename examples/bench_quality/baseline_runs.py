"""The baselines as runs: compress the matrices, put the result in place, judge."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_quality.baselines import (
    METHODS,
    Deltas,
    Grams,
    approximated,
    distill_scales,
    matrix_budget,
    reference_bytes,
    size_report,
)
from bench_quality.baselines_peer import PeerSkipped, deltatensors
from bench_quality.judge import KINDS, Judge
from bench_quality.plan import Run
from bench_quality.texts import calibration_data
from torch import Tensor, nn

import deltamix_hf
from deltamix_hf import DeltaMixConfig
from deltamix_hf.calibration.data import token_batches
from deltamix_hf.calibration.statistics import collect, metrics_of
from deltamix_hf.checkpoint.base import BaseCheckpoint, resolve_base
from deltamix_hf.checkpoint.tensor_diff import sort_tensors
from deltamix_hf.nn.layers import tied_modules, weight_of

__all__ = ["PeerSkipped", "is_baseline", "run_baseline"]
PEER, DISTILLED = "deltatensors ", "BitDelta distilled"
_PEER_BYTES = 12  # of a kept weight in the peer's sparse form


def is_baseline(run: Run) -> bool:
    return run.method not in deltamix_hf.METHODS


def run_baseline(run: Run, judge: Judge) -> dict[str, Any]:
    """As `judge.compress`. The overlay is stored whole, in the fine-tune's dtype."""
    if run.method.startswith(PEER):
        return _run_peer(run, judge)
    deltas, overlay = _difference(judge)
    method = METHODS["BitDelta" if run.method == DISTILLED else run.method]
    grams = _grams(judge, run) if run.method == "whitened low rank" else {}
    whole = reference_bytes(deltas, overlay)
    started = time.perf_counter()
    if run.method == DISTILLED:
        batches = judge.pair.batches("calibration", run.samples, batch_size=4)
        result = distill_scales(judge.finetuned, deltas, batches)
    else:
        budget = 0
        if run.share is not None:
            budget = matrix_budget(whole // run.share, method, deltas, overlay)
        result = method.compress(deltas, grams, budget)
    seconds = time.perf_counter() - started
    size = size_report(result, method, deltas, overlay)
    with approximated(judge.finetuned, deltas, result):
        figures = judge.figures(judge.finetuned)
    return {
        "figures": figures,
        "bytes": {kind: getattr(size, kind) for kind in (*KINDS, "total", "reference")},
        "ratio": size.ratio,
        "seconds": {"total": seconds},
    }


@cache
def _difference(judge: Judge) -> tuple[Deltas, dict[str, Tensor]]:
    """ΔW of every matrix our own methods would pack, and the tensors they would store whole."""
    model = judge.finetuned
    base = BaseCheckpoint(resolve_base(str(judge.pair.base), None, {})[0], model)
    targets, overlay = sort_tensors(model, base, [])
    deltas = {
        name: weight_of(module).detach() - base.read(f"{name}.weight").float()
        for name, module in targets.items()
    }
    return deltas, overlay


def _grams(judge: Judge, run: Run) -> Grams:
    """Gram of the inputs of every linear layer on the calibration texts."""
    model = judge.finetuned
    positions = getattr(model.config, "max_position_embeddings", 2048)
    config = DeltaMixConfig(
        calibration=calibration_data(judge.pair, run.calibration),
        num_samples=run.samples,
        seq_length=positions,
        seed=run.seed,
    )
    uses: dict[str, dict[str, nn.Module]] = {
        name: {n: m for n, m in tied_modules(model, name).items() if isinstance(m, nn.Linear)}
        for name in _difference(judge)[0]
    }
    observed = {n: m for modules in uses.values() for n, m in modules.items()}
    found, scored = collect(model, observed, token_batches(config, judge.pair.tokenizer), False)
    grams = {}
    for name, modules in uses.items():
        statistics = [found[n] for n in modules if n in found]
        inputs = metrics_of(statistics, scored).inputs if statistics else None
        if inputs is not None:
            grams[name] = inputs
    return grams


def _run_peer(run: Run, judge: Judge) -> dict[str, Any]:
    pair = judge.pair
    strategy = run.method.removeprefix(PEER)
    options = {}
    if run.share is not None:  # bytes a kept weight takes / bytes it stands for
        options["sparsity"] = 1 - 2 / (run.share * _PEER_BYTES)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "delta.wdelta"
        restored, size = deltatensors(pair.finetuned, pair.base, file, strategy, **options)
    seconds = time.perf_counter() - started
    model = judge.load(pair.finetuned)
    with torch.no_grad():
        model.load_state_dict(restored, strict=False)
    deltas, overlay = _difference(judge)
    reference = reference_bytes(deltas, overlay)
    return {
        "figures": judge.figures(model),
        "bytes": {"total": size, "reference": reference},
        "ratio": size / reference,
        "seconds": {"total": seconds},
    }
