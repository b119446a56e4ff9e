"""A PEFT adapter as the fine-tune: merged in memory, compressed like any other.

A LoRA's ΔW = B·A has few ranks, so a delta repo holds it almost exactly, and then serves it as it
serves full fine-tunes: one format, one kernel, mixed in one batch. Nothing is merged to disk.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from .architecture import model_class, read_config
from .config import DeltaMixConfig
from .errors import DeltaMixError, first_line
from .quantizer import DeltaMixHfQuantizer

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
