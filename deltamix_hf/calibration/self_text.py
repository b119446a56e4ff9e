"""`calibration="self"`: text that the fine-tune writes itself, for users who have none.

A chat model is given the empty opening of a user's turn and samples a question, then answers it
(both at temperature 1, so the text has the distribution the fine-tune believes in). Any other
causal model continues a random token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import DeltaMixError
from ..nn.layers import weight_of

logger = logging.get_logger(__name__)

# Tokens of a sample at most, a question and its answer together.
SELF_LENGTH = 128
_ROWS = 32
_MARK = "\x00"


def longest_text(model: PreTrainedModel) -> int | None:
    """Tell how many tokens a text may have; None without a bound (XLNet says -1, others 0)."""
    config = model.config.get_text_config()
    kinds = ("", "encoder_", "decoder_")
    found = [getattr(config, f"max_{kind}position_embeddings", None) for kind in kinds]
    skipped = [  # RoBERTa's positions begin behind that of the padding
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min((n - max(skipped, default=0) for n in found if n and n > 0), default=None)


def writes_text(model: PreTrainedModel) -> bool:
    """Tell whether it is a causal language model."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def self_texts(
    model: PreTrainedModel, tokenizer: Any, samples: int, seed: int, length: int = SELF_LENGTH
) -> list[list[int]]:
    """Sample lists of at most `length` token ids; DeltaMixError if the model cannot generate."""
    if not writes_text(model):
        raise DeltaMixError(
            f"calibration='self' needs a causal language model, not a {type(model).__name__}; give "
            "texts or token ids, or None for data-free"
        )
    opening, room = _user_opening(tokenizer), longest_text(model)
    length = min(length, room or length)
    if opening and room and len(_chat(tokenizer, [])) > room // 2:
        opening = []  # a question and its answer do not fit
    vocabulary = min(len(tokenizer), weight_of(model.get_input_embeddings()).shape[0])
    made: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        bar = logging.tqdm(total=samples, desc="Writing calibration text", unit="text")
        while len(made) < samples:
            rows = min(_ROWS, samples - len(made))
            if opening:
                asked = _sample(model, tokenizer, [opening] * rows, length // 2)
                prompts = [_chat(tokenizer, ids[len(opening) :]) for ids in asked]
                made += [row[:room] for row in _sample(model, tokenizer, prompts, length // 2)]
            else:
                first = torch.randint(vocabulary, (rows, 1)).tolist()
                made += _sample(model, tokenizer, first, length - 1)
            bar.update(rows)
        bar.close()
    return made


def _user_opening(tokenizer: Any) -> list[int]:
    """Token ids that open a user's turn; empty without a chat template that can."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turn = [{"role": "user", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception as error:  # a template is a program, and may refuse a lone user's turn
        logger.warning("the chat template cannot open a user's turn (%s); not used", error)
        return []
    opening, found, _ = text.partition(_MARK)
    return tokenizer(opening, add_special_tokens=False)["input_ids"] if found else []


def _chat(tokenizer: Any, question: list[int]) -> list[int]:
    """The question as the model sees it, up to where its answer begins."""
    content = tokenizer.decode(question, skip_special_tokens=True)
    turn = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], most: int
) -> list[list[int]]:
    """Each prompt with up to `most` sampled tokens after it, ended by the end-of-text token."""
    width, room = max(len(p) for p in prompts), longest_text(model)
    most = most if room is None else min(most, room - width)
    if most < 1:
        return prompts
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = pad if pad is not None else end if end is not None else 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most, min_new_tokens=1,
        eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    generate: Any = model.generate
    found: Tensor = generate(
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    rows = []
    for prompt, said in zip(prompts, found[:, width:].tolist(), strict=True):
        stop = said.index(end) + 1 if end in said else len(said)
        rows.append(prompt + said[:stop])
    return rows
