"""The same promises for every architecture: compress, save, reload, run, turn dense.

Models are made from their config classes. The architectures of `tiny_pairs.FAMILIES` are tested in
depth elsewhere; here are those that are built differently: other norms and positions, experts,
vision towers, speech.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pairs import DECODER, fine_tune, quick, relative, weight_bytes
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from deltamix_hf import DeltaMixConfig
from deltamix_hf.inspection import inspect_repo
from deltamix_hf.modules import delta_modules

PLAIN = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2}


def whisper() -> Any:
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 20}
    feed = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_target_positions": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 256}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **feed, **heads, **ids))


def llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_index=255
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {"embed_dim": 64, "hidden_size": 64, "num_heads": 4, "depth": 2, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**DECODER, "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


# How to build it, and how much its delta may take.
ARCHITECTURES: dict[str, tuple[Any, float]] = {
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, head_dim=16)), 0.25),
    "phi": (lambda: PhiForCausalLM(PhiConfig(**DECODER)), 0.25),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN)), 0.25),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**DECODER, **EXPERTS, num_local_experts=4)),
        0.3,
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **DECODER, **EXPERTS, num_experts=4, moe_intermediate_size=64, head_dim=16
            )
        ),
        0.3,
    ),
    "whisper": (whisper, 0.4),
    "qwen2_vl": (qwen2_vl, 0.4),
    "llava": (llava, 0.4),
}


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2, 9), generator=random)
    if model.main_input_name == "input_features":
        sound = torch.randn(2, 80, 40, generator=random)
        return {"input_features": sound, "decoder_input_ids": ids}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs_of(model)).logits


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, tmp_path_factory):
    """Class, folder of base, fine-tune and delta, logits of compressed model and fine-tune."""
    build, ratio = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base")
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    config = DeltaMixConfig(folder / "base", ratio=ratio, **quick("deltamix-kl"))
    packed = type(model).from_pretrained(folder / "tuned", quantization_config=config)
    packed.save_pretrained(folder / "delta")
    return type(model), folder, logits(packed), logits(model), request.param


def test_reload_gives_bit_equal_logits(made):
    cls, folder, packed, tuned, _ = made
    assert torch.equal(logits(cls.from_pretrained(folder / "delta")), packed)
    base = logits(cls.from_pretrained(folder / "base"))
    assert relative(packed, tuned) < 0.5 * relative(base, tuned)


def test_dense_again_is_the_same_within_rounding(made):
    cls, folder, packed, _, _ = made
    dense = cls.from_pretrained(
        folder / "delta", quantization_config=DeltaMixConfig(dequantize=True)
    )
    assert not delta_modules(dense)
    assert relative(logits(dense), packed) < 1e-5


def test_bytes_are_the_promised_ones(made):
    _, folder, _, _, name = made
    report = inspect_repo(folder / "delta")
    assert report.size.total == weight_bytes(folder / "delta")
    assert report.size.ratio <= ARCHITECTURES[name][1]
    assert len(report.matrices) >= 6


def test_beside_the_base(made):
    cls, folder, packed, _, _ = made
    model = cls.from_pretrained(folder / "base")
    plain = logits(model)
    model.load_delta(folder / "delta", "one")
    assert relative(logits(model), packed) < 1e-5
    with model.disable_deltas():
        assert torch.equal(logits(model), plain)
