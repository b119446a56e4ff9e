"""A tiny base with several fine-tunes, for tests of many deltas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiny_pairs import Pair, fine_tune, logits, quick
from torch import Tensor
from transformers import PreTrainedModel

NAMES = ("one", "two", "three")


METHODS = ("deltamix-kl", "delta-come", "deltamix-kl")


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Family:
    """A base, three delta repos made from it by name, and what each gives alone."""

    pair: Pair
    repos: dict[str, Path]

    def alone(self, name: str | None, ids: Tensor) -> Tensor:
        folder = self.pair.base if name is None else self.repos[name]
        return logits(self.pair.load(folder), ids)


def family_of(source: Pair, folder: Path, **options: Any) -> Family:
    """`options`: of compression, for those with the Gaussian codebook."""
    repos = {}
    for seed, (name, method) in enumerate(zip(NAMES, METHODS, strict=True), 2):
        model = source.load(source.base)
        fine_tune(model, seed=seed)
        model.save_pretrained(folder / f"{name}-tuned")
        tuned = replace(source, tuned=folder / f"{name}-tuned")
        chosen = quick(method) | (options if method == "deltamix-kl" else {})
        tuned.compress(method=method, **chosen).save_pretrained(folder / name)
        repos[name] = folder / name
    return Family(source, repos)


def loaded(family: Family) -> PreTrainedModel:
    """The base with all three deltas."""
    found = family.pair.load(family.pair.base)
    for name, repo in family.repos.items():
        found.load_delta(repo, name)
    return found
