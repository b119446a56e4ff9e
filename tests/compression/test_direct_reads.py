"""Weights read past their layers are found, those read by their layers or twins are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from deltamix_hf.compression.direct_reads import read_directly
from deltamix_hf.nn.layers import delta_class

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}


def packable(model) -> list[str]:
    return [name for name, module in model.named_modules() if delta_class(type(module))]


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gpt2", "bert", "t5"])
def test_ordinary_models(pair, name):
    model = pair(name).load(pair(name).tuned)
    assert read_directly(model, packable(model)) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_that_takes_weights_apart():
    audio = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    audio |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    model = WavLMModel(
        WavLMConfig(num_hidden_layers=2, num_conv_pos_embedding_groups=4, **SIZES, **audio)
    )
    found = read_directly(model.eval(), packable(model))
    expected = {f"encoder.layers.{i}.attention.{p}_proj" for i in range(2) for p in ("q", "k", "v")}
    assert expected <= set(found) and "encoder.layers.0.feed_forward.output_dense" not in found


def test_relative_positions_looked_up_by_hand():
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    config = DebertaV2Config(vocab_size=96, num_hidden_layers=1, **SIZES, **positions)
    model = DebertaV2ForMaskedLM(config).eval()
    assert "deberta.encoder.rel_embeddings" in read_directly(model, packable(model))


def test_pictures_and_sound():
    vit = ViTForImageClassification(ViTConfig(num_hidden_layers=1, image_size=32, **SIZES)).eval()
    assert read_directly(vit, packable(vit)) == []
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"vocab_size": 99, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    whisper = WhisperForConditionalGeneration(WhisperConfig(**small, **heads, **ids)).eval()
    assert read_directly(whisper, packable(whisper)) == []


def test_parts_that_the_whole_does_not_run():
    """A speech encoder whose decoder has a config of its own; a vision tower behind a text."""
    audio = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    audio |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    hears = WavLMConfig(num_hidden_layers=1, num_conv_pos_embedding_groups=4, **SIZES, **audio)
    writes = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99, n_positions=32)
    both = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(hears, writes)
    speech = SpeechEncoderDecoderModel(both).eval()
    read = {f"encoder.encoder.layers.0.attention.{p}_proj" for p in ("q", "k", "v")}
    assert read <= set(read_directly(speech, packable(speech)))
    sees = SiglipVisionConfig(image_size=16, patch_size=8, num_hidden_layers=1, **SIZES)
    text = LlamaConfig(vocab_size=99, num_hidden_layers=1, **SIZES)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=sees, text_config=text, image_token_id=98)
    ).eval()
    towers = [n for n, _ in llava.named_modules() if n.endswith("head.attention.out_proj")]
    assert towers and read_directly(llava, [*packable(llava), *towers]) == towers


def test_a_model_that_takes_other_inputs(pair):
    model = pair("bert").load(pair("bert").tuned)

    def forward(*args, **kwargs):
        raise TypeError("graphs only")

    model.forward = forward
    assert read_directly(model, packable(model)) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_that_is_read_and_run(pair):
    """A layer that runs, and whose weight somebody reads besides."""
    model = pair("llama_tied").load(pair("llama_tied").tuned)
    mlp = model.model.layers[1].mlp

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp

        def forward(self, x):
            return self.inner(x) + 0 * self.inner.up_proj.weight.sum()

    names = packable(model)
    model.model.layers[1].mlp = Reader()
    renamed = [n.replace("layers.1.mlp.", "layers.1.mlp.inner.") for n in names]
    assert read_directly(model, renamed) == ["model.layers.1.mlp.inner.up_proj"]
    assert torch.is_grad_enabled()
