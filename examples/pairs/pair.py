"""A base, a fine-tune of it, and the text to compress and judge it with: folders on disk.

    <cache>/<name>/finetuned/         complete model folder (fp32 safetensors, config, tokenizer)
    <cache>/<name>/calibration.jsonl  rows of the training text, for the compressor
    <cache>/<name>/heldout.jsonl      rows neither training nor calibration has seen
    <cache>/<name>/pair.json          recipe, seeds, losses, versions; written last
    <cache>/<base name>/              complete model folder, shared by pairs with the same base

A row is {"prompt", "answer", "text"}: the prompt as the model sees it (chat template applied),
the exact answer (null for an encoder), and both with the end token, which is what a compressor
calibrates on. So nothing but the folders is needed to use a finished pair. Where the fine-tune
learned running text, the "answer" is how the prompt goes on, without an end token: it is scored
token by token, and pair.json says "exact_match": false.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from .batches import Batch, Row, encode, pad

Question = tuple[str, str | None]  # prompt as the model sees it, exact answer (None: no answer)


def cache_root(cache: str | Path | None = None) -> Path:
    """`cache`, else $DELTAMIX_CACHE, else ~/.cache/deltamix_hf/pairs."""
    chosen = cache or os.environ.get("DELTAMIX_CACHE") or "~/.cache/deltamix_hf/pairs"
    return Path(chosen).expanduser()


@dataclass(frozen=True)
class Pair:
    """Paths of a pair, and its text as strings or as tokens. `split`: "heldout", "calibration"."""

    name: str
    base: Path
    finetuned: Path

    @property
    def folder(self) -> Path:
        return self.finetuned.parent

    @property
    def complete(self) -> bool:
        return (self.folder / "pair.json").exists()

    @property
    def info(self) -> dict:
        """What pair.json says: recipe, seeds, losses, versions."""
        return json.loads((self.folder / "pair.json").read_text())

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.finetuned)

    def rows(self, split: str = "heldout", limit: int | None = None) -> list[dict]:
        """The first `limit` rows, as they are in the file."""
        lines = (self.folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:limit]]

    def questions(self, limit: int | None = None) -> tuple[list[str], list[str]]:
        """Held-out prompts (chat template applied) and their exact answers."""
        rows = self.rows("heldout", limit)
        return [row["prompt"] for row in rows], [row["answer"] for row in rows]

    def texts(self, split: str = "calibration", limit: int | None = None) -> list[str]:
        """Whole texts: prompt, answer and end token."""
        return [row["text"] for row in self.rows(split, limit)]

    def token_ids(self, split: str = "calibration", rows: int = 128, length: int = 128) -> Tensor:
        """At most `rows` rows of `length` ids, int64: the texts one after another, no padding."""
        tokenizer = self.tokenizer()
        stream = [i for text in self.texts(split) for i in tokenizer(text).input_ids]
        count = min(rows, len(stream) // length)
        return torch.tensor(stream[: count * length]).view(count, length)

    def batches(
        self, split: str = "heldout", limit: int | None = None, batch_size: int = 8
    ) -> list[Batch]:
        """Right-padded token batches in which answers are scored; no labels for an encoder."""
        tokenizer = self.tokenizer()
        asked = self.rows(split, limit)
        answered = all(row["answer"] is not None for row in asked)

        def tokens(row: dict) -> Row:
            if answered:
                ends = row["text"] != row["prompt"] + row["answer"]
                return encode(tokenizer, row["prompt"], row["answer"], ends)
            return tokenizer(row["prompt"]).input_ids, []

        encoded = [tokens(row) for row in asked]
        cuts = range(0, len(encoded), batch_size)
        batches = [pad(encoded[i : i + batch_size], tokenizer.pad_token_id) for i in cuts]
        kept = ("input_ids", "attention_mask") + (("labels",) if answered else ())
        return [{key: batch[key] for key in kept} for batch in batches]


def write_rows(path: Path, questions: Sequence[Question], end: str = "") -> None:
    """Questions -> one JSON object a line; `end` is the end-of-text token, as text."""
    rows = ({"prompt": p, "answer": a, "text": p + (a or "") + end} for p, a in questions)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write_info(pair: Pair, **facts) -> None:
    """pair.json. Its presence means that the pair is complete, so call this last."""
    packages = ("torch", "transformers", "safetensors")
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    target = pair.folder / "pair.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"name": pair.name, **facts, "versions": versions}) + "\n")
    os.replace(temporary, target)


def save_model(model, tokenizer, folder: Path) -> None:
    """Save beside the final name, then rename: a model folder that exists is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
