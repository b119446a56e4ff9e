"""Compress a fine-tune from its files: one that is never whole in memory, or a PEFT adapter.

`compress_streaming` reads tensors of fine-tune and base in pairs from their files. Calibration runs
block after block: hidden states, gradients and statistics wait on disk for the next block. The
delta repo is the one that compressing in memory writes, byte for byte if the calibration text is
the same and nothing is tuned (tuning sees predictions that were made in other batches, and may
differ in the last digit). Started by `torchrun` or `accelerate launch`, the processes do it
together (`jobs/workers.py`); as many processes write the same bytes.

`compress_adapter` merges an adapter in memory and compresses the result like any other fine-tune. A
LoRA's ΔW = B·A has few ranks, so a delta repo holds it almost exactly, and then serves it as it
serves full fine-tunes: one format, one kernel, mixed in one batch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..checkpoint.base import BaseCheckpoint, repo_files, weights_from_base
from ..checkpoint.model_class import model_class, read_config
from ..compression.model import compress_model
from ..config import DeltaMixConfig, overlay_dtype
from ..errors import DeltaMixError, first_line
from ..jobs.instruments import Stopwatch
from ..jobs.weight_access import unloaded
from ..jobs.workers import Workers
from ..nn.shared_input import link_shared_inputs
from ..storage.names import GUARD, guard_names, packed_part
from .quantizer import DeltaMixHfQuantizer
from .saving import install_save


def compress_streaming(
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: DeltaMixConfig,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Write the delta repo `output` of the fine-tune `finetuned`, a folder or Hub id.

    Args:
        config: as for `from_pretrained`. Its `checkpoint_dir`, a folder beside `output` if not
            given, holds hidden states and statistics too: for a 7B model and 16000 tokens 43 GB.
        device: where it is computed.

    Returns:
        The compressed model without the base's weights: its config and sizes are for reading.

    Raises:
        DeltaMixError: as compressing in memory does; the model is no chain of blocks.
    """
    finetuned, target = os.fspath(finetuned), Path(output).absolute()
    if config.checkpoint_dir is None:
        config.checkpoint_dir = os.fspath(target.with_name(f".{target.name}.unfinished"))
    quantizer = DeltaMixHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    settings = quantizer.quantization_config
    workers = Workers.launched()
    if workers.size > 1 and settings.method.allocation != "global":
        raise DeltaMixError(
            f"method {settings.method.name!r} hands bytes on from one matrix to the next, so it "
            "runs in one process; start it without torchrun, or use method 'deltamix-kl'"
        )
    if workers.rank:
        logging.disable_progress_bar()
    model_config = read_config(finetuned)
    try:
        files, _, quantizer.commit = repo_files(finetuned, {})
    except (OSError, ValueError) as error:
        raise DeltaMixError(
            f"cannot find the weights of {finetuned!r}: {first_line(error)}"
        ) from error
    model = unloaded(model_class(finetuned, model_config), model_config)
    model.config.name_or_path = finetuned
    tuned, base = BaseCheckpoint(files, model), BaseCheckpoint(quantizer.base_files, model)
    outcome = compress_model(
        model, base, settings, quantizer.commit, tuned, torch.device(device), workers
    )
    quantizer.seconds, quantizer.store = outcome.seconds, outcome.store
    quantizer.stored = _stored(model, base, settings, outcome.overlay)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = settings
    model._weight_conversions = []  # type: ignore[assignment]
    link_shared_inputs(model)
    install_save(model)
    if workers.rank:  # the first writes
        return model
    watch = Stopwatch()
    with watch.stage("write"):
        model.save_pretrained(target)
    quantizer.seconds |= watch.seconds
    return model


def _stored(
    model: PreTrainedModel,
    base: BaseCheckpoint,
    config: DeltaMixConfig,
    overlay: dict[str, Tensor],
) -> dict[str, Tensor]:
    """`saving.delta_state_dict` of a model whose base weights are nowhere."""
    tied = set(model.all_tied_weights_keys)
    stored = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if packed_part(name) and name not in tied
    }
    stored |= {name: t.to(overlay_dtype(t.dtype, config)) for name, t in overlay.items()}
    dtype, shape = GUARD
    for name in guard_names(weights_from_base(model, base, stored), model.base_model_prefix):
        stored[name] = torch.zeros(shape, dtype=dtype)
    return stored


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(repo: str) -> bool:
    """Whether a repo, a folder or Hub id, holds a PEFT adapter."""
    return _file(repo, CONFIG) is not None


def compress_adapter(repo: str, config: DeltaMixConfig, **given: Any) -> PreTrainedModel:
    """The base with the adapter merged in, compressed; to be saved like any compressed model.

    Args:
        repo: folder or Hub id of the adapter; its tokenizer, if it has one, is saved along.
        config: as for `from_pretrained`; `base_model` is what the adapter was trained on.
        given: more for the base's `from_pretrained`, a `device_map` say.

    Raises:
        DeltaMixError: peft is missing, the adapter has no safetensors or does not fit the base.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DeltaMixError(f"{repo!r} is a PEFT adapter: pip install peft") from error
    if _file(repo, WEIGHTS) is None:
        raise DeltaMixError(f"{repo!r} has no {WEIGHTS}: save the adapter as safetensors")
    base = str(config.base_model)
    base_config: Any = read_config(base)
    # in float32: rounded to the base's bfloat16, a small delta would drown in the rounding
    plain = model_class(base, base_config).from_pretrained(base, dtype=torch.float32, **given)
    try:
        merged = PeftModel.from_pretrained(plain, repo).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DeltaMixError(
            f"the adapter {repo!r} does not fit the base {base!r}: {first_line(error)}"
        ) from error
    model: PreTrainedModel = merged.eval()
    model.config.name_or_path = os.fspath(repo if _file(repo, "tokenizer_config.json") else base)
    quantizer = DeltaMixHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    if base_config.dtype is not None:
        torch.nn.Module.to(model, dtype=base_config.dtype)  # the base's weights are exact in it
    return model


def _file(repo: str, name: str) -> str | None:
    try:
        return cached_file(repo, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
