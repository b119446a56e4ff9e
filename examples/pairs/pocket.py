"""A small llama made here from nothing: 5.8 M weights, read Python first and Shakespeare then.

The second hard pair: base and fine-tune share next to nothing but the alphabet, so the delta is
large (0.62 of the base's norm) and full-rank. And it is small enough to compress in seconds.

Tokenizer and base come from the source of the standard library (31 MB with its tests), so they
differ from one Python version to another; pair.json says which it was.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .batches import encode, pad_to_budget
from .finetune import Recipe, finetune
from .pair import Pair, save_model, write_info, write_rows
from .shakespeare import PACKAGE, shakespeare

PRETRAIN = Recipe(steps=600, tokens_per_step=2048, learning_rate=2e-3, warmup=40)
FINETUNE = Recipe(steps=250, tokens_per_step=2048, learning_rate=1.5e-3)
CHUNK = 128  # tokens of source in a row of pre-training


def python_files() -> Iterator[str]:
    """The source of the standard library, file by file, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4096 tokens; half a minute, the same every time."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(python_files(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build_base(folder: Path, checkpoint: Path) -> None:
    """Pre-train on Python; continues where an earlier call was killed."""
    if folder.exists():
        return
    tokenizer = make_tokenizer()
    ids: list[int] = []
    for text in python_files():
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    chunks = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
    needed = PRETRAIN.steps * PRETRAIN.tokens_per_step // CHUNK
    rows = [(chunk, chunk) for chunk in random.Random(0).sample(chunks, needed)]
    batches = pad_to_budget(rows, PRETRAIN.tokens_per_step, tokenizer.pad_token_id)
    model = make_model(tokenizer)
    finetune(model, batches, PRETRAIN, checkpoint)
    save_model(model, tokenizer, folder)
    checkpoint.unlink(missing_ok=True)


def build(cache: Path) -> Pair:
    """`pocket-shakespeare`: pre-train and fine-tune in about 20 minutes on one core."""
    name = "pocket-shakespeare"
    pair = Pair(name, cache / "pocket-base", cache / name / "finetuned")
    if pair.complete:
        return pair
    pair.folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    build_base(pair.base, pair.folder / "base.checkpoint.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pair.base)
    model = LlamaForCausalLM.from_pretrained(pair.base, dtype=torch.float32)

    splits = shakespeare(piece_length=120)  # 64 of this tokenizer's tokens
    for split in ("calibration", "heldout"):
        rows = [(e.prompt, e.answer) for e in getattr(splits, split)]
        write_rows(pair.folder / f"{split}.jsonl", rows)
    windows = [encode(tokenizer, e.prompt, e.answer, ends=False) for e in splits.train]
    batches = pad_to_budget(windows, FINETUNE.tokens_per_step, tokenizer.pad_token_id)
    checkpoint = pair.folder / "checkpoint.safetensors"
    losses = finetune(model, batches, FINETUNE, checkpoint)
    save_model(model, tokenizer, pair.finetuned)
    write_info(
        pair,
        base={"source": "Python standard library", "recipe": asdict(PRETRAIN)},
        finetuned=PACKAGE,
        seed=splits.seed,
        exact_match=False,
        recipe=asdict(FINETUNE),
        losses=[round(loss, 4) for loss in losses],
        seconds_of_last_call=round(time.time() - started, 1),
    )
    checkpoint.unlink(missing_ok=True)
    return pair
