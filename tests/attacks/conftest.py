"""A running model with a tenant, and the two ways in which a delta repo is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_settings, refusal
from tiny_pairs import logits, snapshot, token_ids

METHODS = ("delta-come", "deltamix-kl")  # with zero points and without


@dataclass(frozen=True)
class Attacked:
    """A copy of a delta repo, to be damaged, and how to load it.

    `load`: by `from_pretrained`; `serve`: beside a tenant of a running model.
    """

    folder: Path
    load: Callable[..., Any]
    serve: Callable[[], None]
    running: Any
    pair: Any

    def refused(self, *parts: str) -> str:
        """Both ways must be refused in one line, write nothing, and leave the tenant as it was."""
        files = snapshot(self.folder)
        before = logits(self.running, token_ids(2, 6), delta_names=["tenant", None])
        message = refusal(self.load, *parts)
        refusal(self.serve, *parts)
        after = logits(self.running, token_ids(2, 6), delta_names=["tenant", None])
        assert torch.equal(before, after)
        assert list(self.running.list_deltas()) == ["tenant"]
        assert self.running.active_deltas == ["tenant"]
        assert snapshot(self.folder) == files
        return message


@pytest.fixture(scope="session")
def running(delta) -> Callable[[str], Any]:
    """`running(family)`: a base with a delta called "tenant", which no attack may change."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            repo = delta(name)
            made[name] = repo.pair.load(repo.pair.base)
            made[name].load_delta(repo.folder, "tenant")
        return made[name]

    return get


@pytest.fixture
def attack(delta, copied, running) -> Iterator[Callable[..., Attacked]]:
    """`attack(family, method)`: a sound delta repo of one's own, to be damaged."""

    served = []

    def make(name: str = "llama", method: str = "delta-come") -> Attacked:
        repo, model = delta(name, method), running(name)
        folder = copied(repo.folder)
        records = "tensor_fingerprints", "settings_fingerprint", "model_fingerprint"
        edit_settings(folder, **dict.fromkeys(records))  # no attacker leaves them in
        served.append(model)
        return Attacked(
            folder,
            lambda **options: repo.pair.load(folder, **options),
            lambda: model.load_delta(folder, "attack"),
            model,
            repo.pair,
        )

    yield make
    for model in served:  # what was let in must not look like a failure of the next test
        for name in model.list_deltas().keys() - {"tenant"}:
            model.delete_delta(name)
