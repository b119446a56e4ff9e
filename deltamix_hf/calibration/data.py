"""Calibration text: token batches from whatever the user gave, or the fine-tune writes."""

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..config import DeltaMixConfig
from ..constants import BESIDE, FETCHING
from ..errors import DeltaMixError, first_line
from ..jobs.resume_store import ResumeStore
from ..nn.layers import weight_of
from .self_text import SELF_LENGTH, self_texts, writes_text

# Fitted to one token, a tiny llama ended 20 times as far from its fine-tune as the base is.
_FEWEST_TOKENS = 16
logger = logging.get_logger(__name__)

SELF = "self"  # calibration on text that the fine-tune writes
_RANDOM_LENGTH = 128
_TOKENS_PER_FORWARD = 2048  # rows of a token tensor run together up to this many tokens


def no_text_given(config: DeltaMixConfig) -> bool:
    """Tell whether nothing is known of what the fine-tune is for: no data, or what it writes."""
    data = config.calibration
    return data is None or (isinstance(data, str) and data == SELF)


def describe(config: DeltaMixConfig) -> str:
    """Say in a few words what the calibration data is, before the fine-tune writes any."""
    data = config.calibration
    if no_text_given(config):
        return "weights alone"
    if isinstance(data, Tensor):
        rows, length = data[: config.num_samples, : config.seq_length].shape
        return f"token ids [{rows}, {length}]"
    count = f"at most {config.num_samples} texts of {config.seq_length} tokens"
    return f"{count} of {data}" if isinstance(data, str) else count


def calibration_batches(
    model: PreTrainedModel,
    config: DeltaMixConfig,
    store: ResumeStore,
    commit: str | None,
    loaded: bool,
) -> list[Tensor]:
    """Make the token ids int64 [rows, length] of every batch, or read those the job began with.

    The store keeps them, for texts may have changed when an interrupted job goes on, and
    `calibration_source` says what they are. `commit` is of the fine-tune's repo, for its tokenizer;
    a `loaded` model can write text. Raises DeltaMixError if there are no tokens, no tokenizer, or
    token ids outside the vocabulary.
    """
    if (found := store.read("calibration")) is not None:
        tensors, config.calibration_source = found
        return [tensors[str(i)] for i in range(len(tensors))]
    if not no_text_given(config):
        batches = token_batches(config, lambda: _tokenizer(model.config.name_or_path, commit))
        vocabulary = _vocabulary(model)
        if any(int(ids.min()) < 0 or int(ids.max()) >= vocabulary for ids in batches):
            raise DeltaMixError(f"calibration holds token ids that are not 0 to {vocabulary - 1}")
        if (count := sum(ids.numel() for ids in batches)) < _FEWEST_TOKENS:
            raise DeltaMixError(
                f"calibration has {count} tokens, which say too little: give {_FEWEST_TOKENS} or "
                "more, or none"
            )
    else:
        batches = _own_batches(model, config, commit, loaded)
    named = {str(i): ids for i, ids in enumerate(batches)}
    store.write("calibration", named, config.calibration_source)
    return batches


def _own_batches(
    model: PreTrainedModel, config: DeltaMixConfig, commit: str | None, loaded: bool
) -> list[Tensor]:
    """Token ids where no text is given: a causal model writes it, if the method asks for it.

    On `pocket-shakespeare` at 1/16: KL 0.0006, on random tokens, as without a tokenizer, 0.0018,
    from weights alone 0.0165. Others cannot, and their predictions on noise say nothing (`rxnfp`:
    0.088, from weights alone 0.005), so there is nothing to run: empty.
    """
    asked, source = config.calibration == SELF, model.config.name_or_path
    if not asked and not (config.method.fisher and writes_text(model)):
        return []
    if asked and not loaded:  # each token written would read the whole model
        raise DeltaMixError(
            "a model that is not in memory cannot write calibration text; give texts"
        )
    tokenizer = None
    try:
        tokenizer = _tokenizer(source, commit) if loaded else None
    except DeltaMixError:
        if asked:
            raise
        logger.warning("%s has no tokenizer: calibrated on random tokens", source)
    if tokenizer is None:
        config.calibration_source = "random tokens"
        return random_tokens(_vocabulary(model), config)
    length = min(config.seq_length, SELF_LENGTH)
    rows = self_texts(model, tokenizer, config.num_samples, config.seed, length)
    config.calibration_source = f"{len(rows)} texts written by the fine-tune"
    return stacked(rows, config.seed)


def _vocabulary(model: PreTrainedModel) -> int:
    return weight_of(model.get_input_embeddings()).shape[0]


def _tokenizer(source: str | None, commit: str | None) -> Any:
    names = (*BESIDE, "trust_remote_code")
    how = {name: value for name, value in FETCHING.get().items() if name in names}
    try:
        return AutoTokenizer.from_pretrained(source, **how, revision=commit)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DeltaMixError(
            f"calibration by texts needs the tokenizer of {source}, which cannot be loaded "
            f"({first_line(error)}); save it there, or give token ids"
        ) from error


def token_batches(config: DeltaMixConfig, load_tokenizer: Callable[[], Any]) -> list[Tensor]:
    """Make token ids int64 [rows, length] per batch; the tokenizer is only loaded for texts.

    Raises DeltaMixError if the data set cannot be read, or no tokens are left.
    """
    data, cut = config.calibration, {"truncation": True, "max_length": config.seq_length}
    if isinstance(data, Tensor):
        return list(split_rows(data[: config.num_samples, : config.seq_length].long()))
    texts = _read_texts(data) if isinstance(data, str) else list(data or ())
    texts = [text for text in texts if text and text.strip()]
    random.Random(config.seed).shuffle(texts)
    tokenizer = load_tokenizer()
    rows = [tokenizer(text, **cut)["input_ids"] for text in texts[: config.num_samples]]
    return stacked(rows, config.seed)


def random_tokens(vocabulary: int, config: DeltaMixConfig) -> list[Tensor]:
    """Draw token ids int64 [rows, length] at random, for writers of text without a tokenizer."""
    generator = torch.Generator().manual_seed(config.seed)
    length = min(config.seq_length, _RANDOM_LENGTH)
    ids = torch.randint(vocabulary, (config.num_samples, length), generator=generator)
    return list(split_rows(ids))


def split_rows(ids: Tensor, tokens: int = _TOKENS_PER_FORWARD) -> tuple[Tensor, ...]:
    """Split token ids [rows, length, ...] into pieces of at most `tokens` tokens, or of one row."""
    return ids.split(max(1, tokens // ids.shape[1]))


def stacked(rows: Sequence[list[int]], seed: int) -> list[Tensor]:
    """Batch rows of equal length, so that nothing is padded, in an order drawn by `seed`.

    Gives int64 [rows, length]; raises DeltaMixError if no row holds a token.
    """
    same_length: dict[int, list[list[int]]] = {}
    for ids in rows:
        same_length.setdefault(len(ids), []).append(ids)
    same_length.pop(0, None)
    if not same_length:
        raise DeltaMixError(
            "calibration gave no tokens; give non-empty texts, or None for data-free"
        )
    batches = [batch for group in same_length.values() for batch in split_rows(torch.tensor(group))]
    random.Random(seed).shuffle(batches)
    return batches


def _read_texts(name: str) -> list[str]:
    """Texts of a local .txt / .jsonl file, or the "text" column of a data set's train split."""
    if os.path.isfile(name):
        return _read_file(Path(name))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DeltaMixError(
            f"calibration={name[:80]!r} is no local file, and data sets need `pip install datasets`"
        ) from error
    try:
        return list(load_dataset(name, split="train")["text"])
    except Exception as error:
        raise DeltaMixError(
            f"cannot read a train split with a 'text' column from data set {name[:80]!r}: "
            f"{str(error)[:300]}"
        ) from error


def _read_file(path: Path) -> list[str]:
    """Lines of a text file, or the "text" of each line of a .jsonl file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaMixError(f"cannot read calibration texts from {path}: {error}") from error
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DeltaMixError(f'{path}, line {number}, is not of the form {{"text": "..."}}')
        texts.append(row["text"])
    return texts
