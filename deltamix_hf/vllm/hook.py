"""The one place that replaces a private part of vLLM: who manages the adapters of a worker.

vLLM's model runner makes a LRUCacheWorkerLoRAManager, which keeps adapters as dense slots. For a
base that is served with `--quantization deltamix` it gets a `VllmDeltaManager` here; for all else
it gets its own. `register` lets us come so far only with a version of vLLM that this was tried
with.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import lora_model_runner_mixin as runner

from ..constants import QUANT_METHOD
from ..errors import DeltaMixError
from .manager import VllmDeltaManager

_vllms_own = runner.LRUCacheWorkerLoRAManager


def install() -> None:
    """Replace vLLM's manager; more than once is harmless."""
    runner.LRUCacheWorkerLoRAManager = _manager


def _manager(vllm_config: Any, device: Any, *args: Any) -> Any:
    """Make the adapters' manager of a model; DeltaMixError for adapters beside a delta repo."""
    config = vllm_config.quant_config
    if config is None or config.get_name() != QUANT_METHOD:
        return _vllms_own(vllm_config, device, *args)
    if config.settings is not None:
        raise DeltaMixError(
            "a delta repo is served by itself; for several deltas (--enable-lora) serve their base "
            "with --quantization deltamix, and name this one as an adapter too"
        )
    return VllmDeltaManager(vllm_config, device)
