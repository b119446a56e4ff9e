"""`vllm serve` answers as transformers does: one delta repo, and many beside their base."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TOKENS, Deltas
from server import Server
from tiny_pairs import token_ids

PROMPTS = token_ids(8, 12).tolist()


def test_a_delta_repo_alone(deltas, tmp_path):
    with Server(deltas.root / "a", tmp_path / "log") as server:
        model = str(deltas.root / "a")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda p: server.complete(model, p, TOKENS), PROMPTS))
    expected = [deltas.continued("a", prompt) for prompt in PROMPTS]
    assert found == expected
    assert expected != [deltas.continued("base", prompt) for prompt in PROMPTS]


def test_a_wrong_base_is_refused(deltas, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "repo")
    config = repo / "config.json"
    wrong = str(deltas.root / "tuned-b")
    config.write_text(config.read_text().replace(str(deltas.root / "base"), wrong))
    server = Server(repo, tmp_path / "log")
    text = server.output()
    assert server.process.returncode != 0
    assert f"wrong base: 28 of 28 tensors of '{wrong}' differ" in text
    assert '--model-loader-extra-config \'{"base_model": "..."}\'' in text


@pytest.fixture
def two(deltas: Deltas, many: Server) -> Server:
    for name in ("a", "b"):
        assert many.load(name, deltas.root / name)[0] == 200
    yield many
    for name in ("a", "b"):
        many.unload(name)


def test_many_in_one_load(deltas, two):
    names = {"a": "a", "b": "b", str(deltas.root / "base"): "base"}
    asked = [(list(names)[i % 3], PROMPTS[i // 3 % 8]) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda pair: two.complete(*pair, TOKENS), asked))
    assert found == [deltas.continued(names[model], prompt) for model, prompt in asked]
