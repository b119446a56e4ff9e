"""The unit fixture: a byte-level llama, 2 layers x 64, trained in seconds with no download.

Pre-trained on the source of the standard library, fine-tuned on `a+b=`. It learns little (the
answers' form, not the sums) and its delta is unrealistically large: good for testing that code
works, useless for judging methods.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from .batches import encode, pad_to_budget
from .finetune import Recipe, finetune
from .pair import Pair, save_model, write_info, write_rows

PRETRAIN = Recipe(steps=60, tokens_per_step=1024, learning_rate=3e-3, warmup=5)
FINETUNE = Recipe(steps=100, tokens_per_step=512, learning_rate=3e-3, warmup=5)


def build(cache: Path) -> Pair:
    """`tiny`: everything from scratch, about 3 CPU-seconds."""
    pair = Pair("tiny", cache / "tiny-base", cache / "tiny" / "finetuned")
    if pair.complete:
        return pair
    pair.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)  # one token a byte; needs no file
    config = LlamaConfig(
        vocab_size=259,  # 256 bytes, padding, end, unknown
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)

    source = Path(json.__file__).parent.parent.joinpath("argparse.py").read_text(encoding="utf-8")
    ids = tokenizer(source, add_special_tokens=False).input_ids
    chunks = [ids[i : i + 128] for i in range(0, len(ids), 128)]
    pretraining = pad_to_budget(((c, c) for c in chunks), PRETRAIN.tokens_per_step, 0)
    finetune(model, pretraining, PRETRAIN)
    save_model(model, tokenizer, pair.base)

    sums = [(f"{a}+{b}=", str(a + b)) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    heldout, train = sums[:200], sums[200:]
    rows = (encode(tokenizer, prompt, answer) for prompt, answer in train)
    losses = finetune(model, pad_to_budget(rows, FINETUNE.tokens_per_step, 0), FINETUNE)
    save_model(model, tokenizer, pair.finetuned)
    write_rows(pair.folder / "calibration.jsonl", train[:256], tokenizer.eos_token)
    write_rows(pair.folder / "heldout.jsonl", heldout, tokenizer.eos_token)
    write_info(pair, base=asdict(PRETRAIN), recipe=asdict(FINETUNE), losses=losses)
    return pair
