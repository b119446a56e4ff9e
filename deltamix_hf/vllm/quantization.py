"""quant_method "deltamix" for vLLM: plain weights, and beside them room for packed deltas.

This is all of the plug-in that a server imports which meets no delta repo.

It is chosen by the `config.json` of a delta repo, whose own delta is then always added; and by
`--quantization deltamix` for a plain base model, whose deltas come and go like LoRAs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ..config import DeltaMixConfig
from ..constants import QUANT_METHOD
from ..ops.dispatch import TRITON_DTYPES


class DeltaMixQuantization(QuantizationConfig):
    """What vLLM asks of a quantization method.

    `settings` are those of the delta repo that is served, None for a base many deltas may share.
    """

    def __init__(self, settings: DeltaMixConfig | None = None):
        super().__init__()
        self.__setstate__({"settings": settings})

    def __setstate__(self, state: dict[str, Any]) -> None:
        from .loader import use_our_loader

        self.__dict__.update(state)
        use_our_loader()  # unpickled in a worker too: before vLLM looks for a loader there

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeltaMixQuantization:
        """From a delta repo's `quantization_config`; DeltaMixError if a value is out of range."""
        return cls(DeltaMixConfig.from_dict(config))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(TRITON_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # Triton's tl.dot in bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # none beside config.json: a base is served without

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from .layers import DeltaMixEmbeddingMethod, DeltaMixLinearMethod
        from .manager import install

        install()
        if isinstance(layer, LinearBase):
            return DeltaMixLinearMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            return DeltaMixEmbeddingMethod(self)
        return None
