"""Tiny models of every architecture the promises are tested on: `ARCHITECTURES`.

Those of `tiny_pairs.FAMILIES`, and others that are built differently: other norms and positions,
experts, vision towers, speech.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tiny_pairs
import torch
from tiny_pairs import DECODER, FAMILIES, MIXTURES, VOCAB, Family
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

PLAIN = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}


def _gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, head_dim=16))


def _phi() -> PreTrainedModel:
    return PhiForCausalLM(PhiConfig(**DECODER))


def _gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN))


def _qwen3_moe() -> PreTrainedModel:
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**DECODER, **sizes, num_experts_per_tok=2))


def _whisper() -> PreTrainedModel:
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 20}
    feed = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_target_positions": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCAB}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **feed, **heads, **ids))


def _llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_index=255
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> PreTrainedModel:
    vision = {"embed_dim": 64, "hidden_size": 64, "num_heads": 4, "depth": 2, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**DECODER, "rope_parameters": rope}
    ids = {"image_token_id": 255, "video_token_id": 254, "vision_start_token_id": 253}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2VLForConditionalGeneration(config)


def _others(cls: type, ratio: float, build: Callable[[], PreTrainedModel]) -> Family:
    return Family(build, cls, {"ratio": ratio}, generates=False)


ARCHITECTURES = {
    **FAMILIES,
    "mixtral": replace(MIXTURES["mixtral"], packed=None, generates=False),
    "gemma3": _others(Gemma3ForCausalLM, 0.25, _gemma3),
    "phi": _others(PhiForCausalLM, 0.25, _phi),
    "gpt_neox": _others(GPTNeoXForCausalLM, 0.25, _gpt_neox),
    "qwen3_moe": _others(Qwen3MoeForCausalLM, 0.3, _qwen3_moe),
    "whisper": _others(WhisperForConditionalGeneration, 0.4, _whisper),
    "qwen2_vl": _others(Qwen2VLForConditionalGeneration, 0.4, _qwen2_vl),
    "llava": _others(LlavaForConditionalGeneration, 0.4, _llava),
}


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows of nine tokens that all vocabularies here have, or of sound."""
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(3))
    return tiny_pairs.inputs_of(model, ids)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs_of(model)).logits
