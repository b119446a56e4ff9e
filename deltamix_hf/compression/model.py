"""Compress a fine-tune against its base, in place; one matrix of the base is in memory at a time.

Its tensors are sorted by `checkpoint/tensor_diff.py`; the order of all that follows is `job.py`'s.
"""

import importlib.metadata
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration.data import calibration_batches, describe
from ..calibration.self_text import longest_text
from ..checkpoint.base import BaseCheckpoint, guard_names
from ..checkpoint.tensor_diff import sort_tensors
from ..config import DeltaMixConfig, overlay_dtype
from ..errors import DeltaMixError
from ..jobs.resume_store import ResumeStore, job_identity
from ..nn.experts import Expert, fused_sizes
from ..nn.layers import shape_of, weight_of
from ..storage.headers import fingerprints
from .budget import plan_budget
from .direct_reads import read_directly
from .job import Job
from .memory_estimate import estimate_memory
from .runs import Source

logger = logging.get_logger(__name__)

# What the result depends on besides weights, options and text.
_PACKAGES = ("deltamix-hf", "torch", "transformers", "highspy")


def compress(
    source: Source, base: BaseCheckpoint, config: DeltaMixConfig
) -> tuple[dict[str, float], ResumeStore, dict[str, Tensor]]:
    """Replace what differs from the base by packed deltas; fills in the config's records.

    Returns seconds by stage, the store to remove once the delta is saved, what is stored whole.
    Raises a DeltaMixError: shapes differ from the base, NaN weights, budget too small, no tokens.
    """
    model = source.model
    if not base.sources:
        raise DeltaMixError(
            f"the base {config.base_model!r} holds no tensor of a {type(model).__name__}: it is "
            "another kind of model; give the base the fine-tune was made from"
        )
    if not model.all_tied_weights_keys and model.get_output_embeddings() is not None:
        model.config.tie_word_embeddings = False  # or what is saved would be tied again
    targets, overlay = _sorted(source, base, config)
    _begin_records(model, base, config)
    if not targets and not overlay:
        warnings.warn(
            "the fine-tune is identical to its base: the delta is empty", UserWarning, stacklevel=2
        )
        return {}, ResumeStore(), {}
    promised, budget = plan_budget(
        {name: shape_of(module) for name, module in targets.items()},
        {n: (overlay_dtype(t.dtype, config), tuple(t.shape)) for n, t in overlay.items()},
        guard_names(model, base, overlay),
        config,
        {name for name, module in targets.items() if isinstance(module, nn.Embedding)},
        fused_sizes(model, targets),
    )
    store = _resume_store(source, config)
    job = Job(source.runs(base, overlay, targets, store), config)
    batches = calibration_batches(model, config, store, source.commit, source.files is None)
    if source.files is not None and source.workers.rank == 0:
        sequential = config.method.sequential
        peaks = estimate_memory(model, targets, batches, sequential, promised)
        gigabytes = [peak / 1e9 for peak in peaks]
        logger.warning("compressing takes about %.1f GB of memory and %.1f GB of disk", *gigabytes)
    job.measure(batches)
    if config.method.bf16_overlay:
        with torch.no_grad():
            for name, tensor in overlay.items():
                rounded = tensor.to(overlay_dtype(tensor.dtype, config))
                if not torch.isfinite(rounded).all():
                    raise DeltaMixError(
                        f"{name} holds values that are infinite in bfloat16, in which method "
                        f"{config.method.name!r} stores it: use one with bf16_overlay=False"
                    )
                tensor.copy_(rounded)
    job.run(budget)
    if not isinstance(config.calibration, str):
        config.calibration = None
    return job.watch.seconds, store, overlay


def _sorted(
    source: Source, base: BaseCheckpoint, config: DeltaMixConfig
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Modules to pack and tensors to store whole, by name."""
    model, files = source.model, source.files
    skip = config.modules_to_not_convert or []
    targets, overlay = sort_tensors(model, base, skip, files)
    if files is not None:
        with torch.device("meta"):  # where it can run without weights
            model = type(model)(model.config).eval()
    layers = [name for name, target in targets.items() if not isinstance(target, Expert)]
    if direct := read_directly(model, layers):
        logger.warning(
            "%d matrices are stored whole, because the model reads their weights past the layers: "
            "%s ...", len(direct), direct[0],
        )  # fmt: skip
        for name in direct:
            weight = weight_of(targets.pop(name)).detach()
            overlay[f"{name}.weight"] = files.read(f"{name}.weight") if files else weight
    return targets, overlay


def _begin_records(model: PreTrainedModel, base: BaseCheckpoint, config: DeltaMixConfig) -> None:
    # new ones: the caller's config shares the old
    config.errors, config.dropped, config.measured = {}, [], {}
    config.base_fingerprints = fingerprints(base.infos)
    config.resized = base.resized
    config.seq_length = min(config.seq_length, longest_text(model) or config.seq_length)
    config.calibration_source = describe(config)


def _resume_store(source: Source, config: DeltaMixConfig) -> ResumeStore:
    """The finished parts of a job that could not but give the same result as this one."""
    if config.checkpoint_dir is None:
        return ResumeStore()
    data, files = config.calibration, source.files
    tensors = {} if files else dict(source.model.state_dict())
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
        "workers": source.workers.size,  # sums are split in as many
        "device": str(source.model.device),
        "files": fingerprints(files.infos) if files else None,
    }
    store = ResumeStore(config.checkpoint_dir, job_identity(facts, tensors))
    if source.workers.rank == 0:
        store.drop_damaged()
    source.workers.barrier()
    return store
