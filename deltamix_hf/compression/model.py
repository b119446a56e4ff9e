"""Compress a loaded fine-tune against its base, in place.

Sorts every tensor of the model (`checkpoint/tensor_diff.py`), measures the fine-tune on the
calibration text, then runs the pipeline matrix by matrix, each time putting the base weight where
the fine-tuned one was, and tunes the scales at last. One matrix of the base is in memory at a time.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..calibration.data import SELF, describe, no_text_given, random_tokens, stacked, token_batches
from ..calibration.self_text import self_texts, writes_text
from ..checkpoint.base import BaseCheckpoint, weights_from_base
from ..checkpoint.tensor_diff import sort_tensors
from ..config import DeltaMixConfig, overlay_dtype
from ..errors import DeltaMixError, first_line
from ..jobs.resume_store import ResumeStore, job_identity
from ..jobs.weight_access import LazyWeights, LoadedWeights
from ..jobs.workers import Workers
from ..nn.experts import Expert, fused_sizes
from ..nn.layers import shape_of, weight_of
from ..storage.headers import fingerprints
from ..storage.names import guard_names
from .budget import plan_budget
from .direct_reads import read_directly
from .job import Job
from .lazy_job import LazyJob

logger = logging.get_logger(__name__)


# What the result depends on besides weights, options and text.
_PACKAGES = ("deltamix-hf", "torch", "transformers", "highspy")


@dataclass(frozen=True)
class Outcome:
    """Seconds by stage, the journal to remove once the delta is saved, what is stored whole."""

    seconds: dict[str, float]
    store: ResumeStore
    overlay: dict[str, Tensor]


def compress_model(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    config: DeltaMixConfig,
    revision: str | None = None,
    files: BaseCheckpoint | None = None,
    device: torch.device | None = None,
    workers: Workers | None = None,
) -> Outcome:
    """Replace what differs from the base by packed deltas; fills in the config's records.

    `revision` is the fine-tune's commit, for its tokenizer; None for a local folder. `files` has
    the fine-tune's weights if the model is one of `weights.unloaded`, to run on `device`, by
    `workers` together.

    Raises:
        DeltaMixError: shapes differ from the base, NaN weights, budget too small, no tokens.
    """
    if not base.sources:
        raise DeltaMixError(
            f"the base {config.base_model!r} holds no tensor of a {type(model).__name__}: it is "
            "another kind of model; give the base the fine-tune was made from"
        )
    skip = config.modules_to_not_convert or []
    targets, overlay = sort_tensors(model, base, skip, files)
    layers = [name for name, target in targets.items() if not isinstance(target, Expert)]
    if direct := read_directly(model if files is None else _empty(model), layers):
        logger.warning(
            "%d matrices are stored whole, because the model reads their weights past the layers: "
            "%s ...", len(direct), direct[0],
        )  # fmt: skip
        for name in direct:
            weight = weight_of(targets.pop(name)).detach()
            overlay[f"{name}.weight"] = files.read(f"{name}.weight") if files else weight
    shapes = {name: shape_of(module) for name, module in targets.items()}
    # new ones: the caller's config shares the old
    config.errors, config.dropped, config.measured = {}, [], {}
    config.base_fingerprints = fingerprints(base.infos)
    config.resized = base.resized
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    config.seq_length = min(config.seq_length, positions or config.seq_length)
    config.calibration_source = describe(config)
    if not targets and not overlay:
        warnings.warn(
            "the fine-tune is identical to its base: the delta is empty", UserWarning, stacklevel=2
        )
        return Outcome({}, ResumeStore(), {})
    budget = plan_budget(
        shapes,
        {
            name: (overlay_dtype(tensor.dtype, config), tuple(tensor.shape))
            for name, tensor in overlay.items()
        },
        guard_names(weights_from_base(model, base, overlay), model.base_model_prefix),
        config,
        {name for name, module in targets.items() if isinstance(module, nn.Embedding)},
        fused_sizes(model, targets),
    )
    store = _journal(model, config, files, workers or Workers())
    job = Job(model, base, config, targets, store, LoadedWeights(model, base))
    if files is not None:
        assert device is not None
        lazy = LazyWeights(model, files, base, device, overlay)
        job = LazyJob(model, base, config, targets, store, lazy, workers)
    batches = _tokens(model, config, revision, store, files is None)
    if isinstance(job, LazyJob) and not job.workers.rank:
        logger.warning("compressing takes %s", job.estimate_memory(batches, budget.total))
    job.measure(batches)
    if config.method.bf16_overlay:
        with torch.no_grad():
            for tensor in overlay.values():
                tensor.copy_(tensor.to(overlay_dtype(tensor.dtype, config)))
    job.run(budget)
    if not isinstance(config.calibration, str):
        config.calibration = None
    return Outcome(job.watch.seconds, store, overlay)


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """One like it on the meta device, which can run without weights."""
    with torch.device("meta"):
        return type(model)(model.config).eval()


def _journal(
    model: PreTrainedModel, config: DeltaMixConfig, files: BaseCheckpoint | None, workers: Workers
) -> ResumeStore:
    """The finished parts of a job that could not but give the same result as this one."""
    if config.checkpoint_dir is None:
        return ResumeStore()
    data = config.calibration
    tensors = {} if files else dict(model.state_dict())
    if isinstance(data, Tensor):
        tensors["calibration"], data = data, "token ids"
    elif isinstance(data, str) and os.path.isfile(data):
        data = Path(data).read_bytes().hex()
    settings = config.to_dict()
    facts = {
        "settings": {k: v for k, v in settings.items() if k not in ("dequantize", "base_model")},
        "calibration": data if data is None or isinstance(data, str) else list(data),
        "versions": [importlib.metadata.version(package) for package in _PACKAGES],
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "workers": workers.size,  # whose sums are split in as many
        "files": fingerprints(files.infos) if files else None,
    }
    return ResumeStore(config.checkpoint_dir, job_identity(facts, tensors))


def _tokens(
    model: PreTrainedModel,
    config: DeltaMixConfig,
    revision: str | None,
    store: ResumeStore,
    loaded: bool,
) -> list[Tensor]:
    """`_batches`, or what they were when the job began: texts may have changed since."""
    found = store.read("calibration")
    if found is not None:
        tensors, config.calibration_source = found
        return [tensors[str(i)] for i in range(len(tensors))]
    batches = _batches(model, config, revision, loaded)
    named = {str(i): ids for i, ids in enumerate(batches)}
    store.write("calibration", named, config.calibration_source)
    return batches


def _batches(
    model: PreTrainedModel, config: DeltaMixConfig, revision: str | None, loaded: bool
) -> list[Tensor]:
    """Token ids of the calibration data, checked against the vocabulary.

    Without any, a causal language model writes it, if the method weighs errors by predictions. On
    `pocket-shakespeare` at 1/16: KL 0.0006, on random tokens, as without a tokenizer, 0.0018, from
    weights alone 0.0165. Others cannot, and their predictions on noise say nothing (`rxnfp`: 0.088,
    from weights alone 0.005), so there is nothing to run: empty.
    """
    if config.calibration is None and not (config.method.fisher and writes_text(model)):
        return []
    vocabulary = weight_of(model.get_input_embeddings()).shape[0]
    source = model.config.name_or_path
    if no_text_given(config):
        if not loaded:  # each token written would read the whole model
            if config.calibration == SELF:
                raise DeltaMixError(
                    "a model that is not in memory cannot write calibration text; give texts"
                )
            config.calibration_source = "random tokens"
            return random_tokens(vocabulary, config)
        try:
            tokenizer = _tokenizer(source, revision)
        except DeltaMixError:
            if config.calibration == SELF:
                raise
            logger.warning("%s has no tokenizer: calibrated on random tokens", source)
            config.calibration_source = "random tokens"
            return random_tokens(vocabulary, config)
        rows = self_texts(model, tokenizer, config.num_samples, config.seed)
        config.calibration_source = f"{len(rows)} texts written by the fine-tune"
        return stacked(rows, config.seed)
    batches = token_batches(config, lambda: _tokenizer(source, revision))
    if any(int(ids.min()) < 0 or int(ids.max()) >= vocabulary for ids in batches):
        raise DeltaMixError(f"calibration holds token ids that are not 0 to {vocabulary - 1}")
    return batches


def _tokenizer(source: str | None, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DeltaMixError(
            f"calibration by texts needs the tokenizer of {source}, which cannot be loaded "
            f"({first_line(error)}); save it there, or give token ids"
        ) from error
