"""A base, a fine-tune of it, and the text to compress and judge it with: one folder on disk.

    <cache>/<name>/finetuned/         complete model folder (fp32 safetensors, config, tokenizer)
    <cache>/<name>/calibration.jsonl  rows of the training text, for the compressor
    <cache>/<name>/heldout.jsonl      rows neither training nor calibration has seen
    <cache>/<name>/pair.json          recipe, seeds, losses, versions
    <cache>/<base name>/              complete model folder, shared by pairs with the same base

A row is {"prompt", "answer"}; the prompt is stored as the model sees it (chat template applied),
so nothing but the tokenizer is needed to use a finished pair.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from .batches import Batch, encode, pad


def cache_root(cache: str | Path | None = None) -> Path:
    """`cache`, else $DELTAMIX_CACHE, else ~/.cache/deltamix_hf/pairs."""
    chosen = cache or os.environ.get("DELTAMIX_CACHE") or "~/.cache/deltamix_hf/pairs"
    return Path(chosen).expanduser()


@dataclass(frozen=True)
class Pair:
    """Paths of a finished pair, and its text as prompts or as token batches."""

    name: str
    base: Path
    finetuned: Path

    @property
    def folder(self) -> Path:
        return self.finetuned.parent

    @property
    def info(self) -> dict:
        """What pair.json says: recipe, seeds, losses, versions."""
        return json.loads((self.folder / "pair.json").read_text())

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.finetuned)

    def rows(self, split: str = "heldout", limit: int | None = None) -> list[dict[str, str]]:
        """The first `limit` rows of "heldout" or "calibration"."""
        lines = (self.folder / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[:limit]]

    def questions(self, limit: int | None = None) -> tuple[list[str], list[str]]:
        """Held-out prompts (chat template applied) and their exact answers."""
        rows = self.rows("heldout", limit)
        return [row["prompt"] for row in rows], [row["answer"] for row in rows]

    def batches(
        self, split: str = "heldout", limit: int | None = None, batch_size: int = 8
    ) -> list[Batch]:
        """Prompts with their answers as right-padded token batches; answers are scored."""
        tokenizer = self.tokenizer()
        rows = [encode(tokenizer, r["prompt"], r["answer"]) for r in self.rows(split, limit)]
        cuts = range(0, len(rows), batch_size)
        return [pad(rows[i : i + batch_size], tokenizer.pad_token_id) for i in cuts]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """(prompt, answer) rows -> one JSON object a line."""
    lines = (json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in rows)
    path.write_text("\n".join(lines) + "\n")


def write_info(folder: Path, **facts) -> None:
    """pair.json. Written last: its presence means that the pair is complete."""
    packages = ("torch", "transformers", "safetensors")
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    text = json.dumps({**facts, "versions": versions, "threads": torch.get_num_threads()}, indent=2)
    temporary = folder / "pair.json.tmp"
    temporary.write_text(text + "\n")
    os.replace(temporary, folder / "pair.json")
