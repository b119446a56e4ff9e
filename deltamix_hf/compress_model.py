"""Compress a loaded fine-tune against its base, in place.

Sorts every tensor of the model into: identical to the base (not stored), a matrix to pack, or
overlay (stored whole); measures the fine-tune on the calibration text; then runs the pipeline
matrix by matrix, each time putting the base weight where the fine-tuned one was, and tunes the
scales at last. One matrix of the base is in memory at a time.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .base import BaseCheckpoint, same, weights_from_base
from .budget import plan_budget
from .bypass import read_directly
from .calibration import (
    SELF,
    describe,
    no_text_given,
    random_tokens,
    stacked,
    token_batches,
)
from .config import DeltaMixConfig, overlay_dtype
from .errors import DeltaMixError, first_line
from .experts import Expert, FusedWeight, fused_sizes, fused_weights, is_experts
from .format import ROWS, fingerprints, guard_names
from .job import Job
from .journal import Journal, identity_of
from .lazy_job import LazyJob
from .modules import delta_class, shape_of, weight_of
from .self_text import self_texts, writes_text
from .vocabulary import is_resized, one_for_each_token, vocabulary_modules
from .weights import LazyWeights, LoadedWeights
from .workers import Workers

logger = logging.get_logger(__name__)

# At 64 x 64 the four header entries of a packed matrix (about 430 bytes) take most of a 1/16 share
# (512 bytes); anything smaller is stored whole.
_SMALLEST = 4096

# |ΔW| / |W|: two models that share nothing but their sizes are 1.41 apart; the farthest fine-tune
# met, trained long on other text, 0.62.
_UNRELATED = 0.9

_ROWS = 4096  # of a matrix in float32 at once

# What the result depends on besides weights, options and text.
_PACKAGES = ("deltamix-hf", "torch", "transformers", "highspy")


@dataclass(frozen=True)
class Outcome:
    """Seconds by stage, the journal to remove once the delta is saved, what is stored whole."""

    seconds: dict[str, float]
    journal: Journal
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
        return Outcome({}, Journal(), {})
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
    journal = _journal(model, config, files)
    job = Job(model, base, config, targets, journal, LoadedWeights(model, base))
    if files is not None:
        assert device is not None
        lazy = LazyWeights(model, files, base, device, overlay)
        job = LazyJob(model, base, config, targets, journal, lazy, workers)
    batches = _tokens(model, config, revision, journal, files is None)
    if isinstance(job, LazyJob) and not job.workers.rank:
        logger.warning("compressing takes %s", job.needs(batches, budget.total))
    job.measure(batches)
    if config.bf16_overlay:
        with torch.no_grad():
            for tensor in overlay.values():
                tensor.copy_(tensor.to(overlay_dtype(tensor.dtype, config)))
    job.run(budget)
    if not isinstance(config.calibration, str):
        config.calibration = None
    return Outcome(job.watch.seconds, journal, overlay)


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """One like it on the meta device, which can run without weights."""
    with torch.device("meta"):
        return type(model)(model.config).eval()


def _journal(
    model: PreTrainedModel, config: DeltaMixConfig, files: BaseCheckpoint | None
) -> Journal:
    """The finished parts of a job that could not but give the same result as this one."""
    if config.checkpoint_dir is None:
        return Journal()
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
        "files": fingerprints(files.infos) if files else None,
    }
    return Journal(config.checkpoint_dir, identity_of(facts, tensors))


def _tokens(
    model: PreTrainedModel,
    config: DeltaMixConfig,
    revision: str | None,
    journal: Journal,
    loaded: bool,
) -> list[Tensor]:
    """`_batches`, or what they were when the job began: texts may have changed since."""
    found = journal.read("calibration")
    if found is not None:
        tensors, config.calibration_source = found
        return [tensors[str(i)] for i in range(len(tensors))]
    batches = _batches(model, config, revision, loaded)
    named = {str(i): ids for i, ids in enumerate(batches)}
    journal.write("calibration", named, config.calibration_source)
    return batches


def sort_tensors(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    skip: Sequence[str],
    files: BaseCheckpoint | None = None,
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Modules to pack and tensors to store whole, by name; what equals the base is in neither.

    `files` has the model's tensors if they are not in memory.

    Raises:
        DeltaMixError: a tensor has another shape in the base, or is not finite.
    """
    targets: dict[str, nn.Module] = {}
    overlay: dict[str, Tensor] = {}
    tied = set(model.all_tied_weights_keys)
    ends = vocabulary_modules(model)
    moved = size = 0.0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if files is not None:
            if name not in files:
                raise DeltaMixError(f"the fine-tune's files hold no {name}: they are incomplete")
            tensor = files.read(name).to(tensor.dtype)
        module_name, _, leaf = name.rpartition(".")
        if name in base:
            value = base.read(name)
            if leaf == "weight" and is_resized(base, ends.get(module_name), name):
                base.resize(name, tensor)
                value = base.read(name)
                if (added := base.added(name)) is not None:
                    overlay[f"{module_name}.{ROWS}"] = added
            elif value.shape != tensor.shape and not one_for_each_token(ends.values(), tensor):
                raise DeltaMixError(
                    f"{name} is {list(tensor.shape)} in the fine-tune and {list(value.shape)} in "
                    "the base: this is not the base it was fine-tuned from"
                )
            if same(tensor, value):
                continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaMixError(f"{name} of the fine-tune holds NaN or infinite values")
        module = model.get_submodule(module_name)
        if name in base and packable_experts(module, name, skip):
            targets |= differing_experts(model, name, tensor, value)
        elif name in base and leaf == "weight" and packable(module, module_name, skip):
            targets[module_name] = module
        else:
            overlay[name] = tensor
            continue
        pairs = (t.flatten(0, -2).split(_ROWS) for t in (tensor, value))
        for rows, other in zip(*pairs, strict=True):
            other = other.to(tensor.device, torch.float32)
            moved += float((rows.float() - other).square().sum())
            size += float(other.square().sum())
    if moved > _UNRELATED**2 * size:
        warnings.warn(
            f"the fine-tune's weights are {(moved / size) ** 0.5 if size else math.inf:.2f} times "
            "the base's norm away from it: this does not look like a fine-tune of this base, and "
            "its delta will not be small; give the base it was made from",
            UserWarning,
            stacklevel=4,
        )
    return targets, overlay


def packable(module: nn.Module, name: str, skip: Sequence[str]) -> bool:
    """Whether the module's weight is stored as ranks, if it differs; `skip` names what is not."""
    return (
        delta_class(type(module)) is not None
        and weight_of(module).numel() >= _SMALLEST
        and not _skipped(name, skip)
    )


def packable_experts(module: nn.Module, name: str, skip: Sequence[str]) -> bool:
    """Whether the tensor `name` of the module holds experts that are stored as ranks."""
    owner, _, leaf = name.rpartition(".")
    return (
        is_experts(module)
        and leaf in fused_weights(module)
        and module.get_parameter(leaf)[0].numel() >= _SMALLEST
        and not _skipped(owner, skip)
        and not _skipped(name, skip)
    )


def differing_experts(
    model: PreTrainedModel, name: str, tensor: Tensor, base: Tensor
) -> dict[str, nn.Module]:
    """The experts of a 3-D parameter whose matrix is not the base's, by name."""
    fused = FusedWeight(model, name)
    pairs = enumerate(zip(tensor, base, strict=True))
    return {f"{name}.{i}": fused.expert(i) for i, (ours, its) in pairs if not same(ours, its)}


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(name == s or name.endswith("." + s) or name.startswith(s + ".") for s in skip)


def _batches(
    model: PreTrainedModel, config: DeltaMixConfig, revision: str | None, loaded: bool
) -> list[Tensor]:
    """Token ids of the calibration data, checked against the vocabulary.

    Without any, a causal language model writes it, if the method weighs errors by predictions. On
    `pocket-shakespeare` at 1/16: KL 0.0006, on random tokens, as without a tokenizer, 0.0018, from
    weights alone 0.0165. Others cannot, and their predictions on noise say nothing (`rxnfp`: 0.088,
    from weights alone 0.005), so there is nothing to run: empty.
    """
    if config.calibration is None and not (config.fisher and writes_text(model)):
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
