"""A tiny llama with a tokenizer and a fine-tune of it, made on the spot."""

from __future__ import annotations

from typing import Any

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny_tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def tiny_llama(tokenizer: Any, layers: int) -> Any:
    """Its weights are drawn by torch's own generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def fine_tune(model: Any) -> None:
    """Adds a matrix of decaying spectrum to every projection, and moves one norm."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                u, _, v = torch.linalg.svd(torch.randn(weight.shape), full_matrices=False)
                spectrum = 0.5 * 0.9 ** torch.arange(len(v))
                weight += ((u * spectrum) @ v).to(weight.dtype)
        model.model.norm.weight += 0.1
