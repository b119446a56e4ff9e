"""Compression of a fine-tune that is never whole in memory, nor is its base.

Tensors of both are read in pairs from their files. Calibration runs block after block: hidden
states, gradients and statistics wait on disk for the next block. The delta repo is the one that
compressing in memory writes, byte for byte if the calibration text is the same and nothing is tuned
(tuning sees predictions that were made in other batches, and may differ in the last digit).

Started by `torchrun` or `accelerate launch`, the processes do it together (`workers.py`), and the
bytes are the same again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .architecture import model_class, read_config
from .base import BaseCheckpoint, repo_files, weights_from_base
from .compress_model import compress_model
from .config import DeltaMixConfig, overlay_dtype
from .errors import DeltaMixError, first_line
from .format import GUARD, guard_names, packed_part
from .quantizer import DeltaMixHfQuantizer
from .saving import install_save
from .siblings import link_siblings
from .stopwatch import Stopwatch
from .weights import unloaded
from .workers import Workers


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
    if workers.size > 1 and settings.allocation != "global":
        raise DeltaMixError(
            f"method {settings.method!r} hands bytes on from one matrix to the next, so it runs in "
            "one process; start it without torchrun, or use method 'deltamix-kl'"
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
    quantizer.seconds, quantizer.journal = outcome.seconds, outcome.journal
    quantizer.stored = _stored(model, base, settings, outcome.overlay)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = settings
    model._weight_conversions = []  # type: ignore[assignment]
    link_siblings(model)
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
