"""Compress a fine-tune that transformers does not load: from its files, or a PEFT adapter.

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

import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..checkpoint.base import BaseCheckpoint
from ..checkpoint.model_class import model_class, read_config
from ..compression.runs import Source
from ..config import DeltaMixConfig
from ..errors import DeltaMixError, first_line
from ..jobs.instruments import Stopwatch
from ..jobs.weight_access import unloaded
from ..jobs.workers import Workers
from ..storage.durable import check_output
from ..storage.headers import read_headers
from ..storage.untrusted_paths import repo_files
from .quantizer import DeltaMixHfQuantizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def compress(source: Source, config: DeltaMixConfig) -> PreTrainedModel:
    """Compress a fine-tune as `from_pretrained` does after loading; to be saved like any other.

    A copy of `config` gets the records. Raises a DeltaMixError as `compression.model.compress`, or
    if the base cannot be found.
    """
    quantizer = DeltaMixHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    quantizer.source = source
    source.model.hf_quantizer = quantizer  # type: ignore[assignment]
    return quantizer.postprocess_model(source.model)


def compress_streaming(
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: DeltaMixConfig,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Write the delta repo `output` of the fine-tune `finetuned`, a folder or Hub id.

    Args:
        config: as for `from_pretrained`. Its `checkpoint_dir`, a folder beside `output` if not
            given, holds hidden states and statistics too: for a 7B model and 16000 tokens 43 GB.
        device: where it is computed.
        trust_remote_code: run the fine-tune's own code for its model.

    Returns:
        The compressed model without the base's weights: its config and sizes are for reading.

    Raises:
        DeltaMixError: as compressing in memory does; the model is no chain of blocks.
    """
    finetuned, target = os.fspath(finetuned), Path(output).absolute()
    if config.checkpoint_dir is None:
        config.checkpoint_dir = os.fspath(target.with_name(f".{target.name}.unfinished"))
    workers = Workers.launched()
    if workers.size > 1 and config.method.allocation != "global":
        raise DeltaMixError(
            f"method {config.method.name!r} hands bytes on from one matrix to the next, so it "
            "runs in one process; start it without torchrun, or use method 'deltamix-kl'"
        )
    if workers.rank:
        logging.disable_progress_bar()
    model_config = read_config(finetuned, trust_remote_code)
    try:
        files, _, commit = repo_files(finetuned, {})
    except (OSError, ValueError) as error:
        raise DeltaMixError(
            f"cannot find the weights of {finetuned!r}: {first_line(error)}"
        ) from error
    if not workers.rank:
        check_output(target, most_bytes(files, config))
    cls = model_class(finetuned, model_config, trust_remote_code)
    model = unloaded(cls, model_config)
    model.config.name_or_path = finetuned
    compress(Source(model, commit, BaseCheckpoint(files, model), device, workers), config)
    if workers.rank == 0:
        watch = Stopwatch()
        with watch.stage("write"):
            model.save_pretrained(target)
        cast(DeltaMixHfQuantizer, model.hf_quantizer).seconds |= watch.seconds
    return model


def most_bytes(files: list[str], config: DeltaMixConfig) -> int:
    """Bytes that the delta takes if every tensor in the fine-tune's weight files differs."""
    infos = read_headers(files).values()
    return config.budget(torch.bfloat16.itemsize * sum(math.prod(i.shape) for i in infos))


def is_adapter(repo: str) -> bool:
    """Tell whether a repo, a folder or Hub id, holds a PEFT adapter."""
    return _file(repo, CONFIG) is not None


def compress_adapter(
    repo: str, config: DeltaMixConfig, trust_remote_code: bool = False, **given: Any
) -> PreTrainedModel:
    """Merge an adapter, a folder or Hub id, into its base and compress that; to be saved like any.

    Its tokenizer, if it has one, is saved along; `given` is for the base's `from_pretrained`, a
    `device_map` say, and `trust_remote_code` lets the base bring code of its own. Raises a
    DeltaMixError if peft is missing, the adapter has no safetensors or does not fit
    `config.base_model`.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DeltaMixError(f"{repo!r} is a PEFT adapter: pip install peft") from error
    if _file(repo, WEIGHTS) is None:
        raise DeltaMixError(f"{repo!r} has no {WEIGHTS}: save the adapter as safetensors")
    base = str(config.base_model)
    base_config: Any = read_config(base, trust_remote_code)
    cls = model_class(base, base_config, trust_remote_code)
    given["trust_remote_code"] = trust_remote_code
    # in float32: rounded to the base's bfloat16, a small delta would drown in the rounding
    plain = cls.from_pretrained(base, dtype=torch.float32, **given)
    try:
        merged = PeftModel.from_pretrained(plain, repo).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DeltaMixError(
            f"the adapter {repo!r} does not fit the base {base!r}: {first_line(error)}"
        ) from error
    model: PreTrainedModel = merged.eval()
    model.config.name_or_path = os.fspath(repo if _file(repo, "tokenizer_config.json") else base)
    model = compress(Source(model), config)
    if base_config.dtype is not None:
        torch.nn.Module.to(model, dtype=base_config.dtype)  # the base's weights are exact in it
    return model


def _file(repo: str, name: str) -> str | None:
    try:
        return cached_file(repo, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
