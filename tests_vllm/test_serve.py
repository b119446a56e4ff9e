"""`vllm serve` answers as transformers does: one delta repo, and many beside their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from conftest import PROMPTS, TOKENS, Deltas
from server import Server
from tiny_pairs import token_ids

Asked = list[tuple[str, int]]  # a model and the number of a prompt


def answers(server: Server, asked: Asked) -> list[list[int]]:
    """All of them asked for at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        one = [pool.submit(server.complete, model, PROMPTS[i], TOKENS) for model, i in asked]
        return [answer.result() for answer in one]


def expected(deltas: Deltas, asked: Asked) -> list[list[int]]:
    return [deltas.continued(model)[i] for model, i in asked]


@pytest.mark.parametrize("options", [[], ["--tensor-parallel-size=2"], ["--no-enforce-eager"]])
def test_a_delta_repo_alone(deltas, tmp_path, options):
    options = ["--served-model-name", "a", *options]
    with Server(deltas.root / "a", tmp_path / "log", *options) as server:
        found = answers(server, [("a", i) for i in range(8)])
    assert found == deltas.continued("a") != deltas.continued("base")


def test_a_wrong_base_is_refused(deltas, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "repo")
    wrong = _with_base(repo, deltas, "tuned-b")
    server = Server(repo, tmp_path / "log")
    text = server.output()
    assert server.process.returncode != 0
    assert f"wrong base: 28 of 28 tensors of '{wrong}' differ" in text
    assert '--model-loader-extra-config \'{"base_model": "..."}\'' in text


def test_a_moved_base_is_named(deltas, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "repo")
    _with_base(repo, deltas, "gone")
    given = json.dumps({"base_model": str(deltas.root / "base")})
    options = ["--served-model-name", "a", "--model-loader-extra-config", given]
    with Server(repo, tmp_path / "log", *options) as server:
        assert answers(server, [("a", 0)]) == expected(deltas, [("a", 0)])


def _with_base(repo: Path, deltas: Deltas, name: str) -> str:
    config = repo / "config.json"
    config.write_text(
        config.read_text().replace(str(deltas.root / "base"), str(deltas.root / name))
    )
    return str(deltas.root / name)


@pytest.fixture
def two(deltas: Deltas, many: Server) -> Iterator[Server]:
    for name in ("a", "b"):
        assert many.load(name, deltas.root / name)[0] == 200
    yield many
    for name in ("a", "b"):
        many.unload(name)


def test_many_in_one_load(deltas, two):
    asked = [(("a", "b", "base")[i % 3], i // 3 % 8) for i in range(32)]
    assert answers(two, asked) == expected(deltas, asked)


def test_many_over_two_ranks(deltas, tmp_path):
    options = ["--quantization", "deltamix", "--enable-lora", "--max-loras", "2"]
    options += ["--served-model-name", "base", "--tensor-parallel-size", "2", "--lora-modules"]
    options += [f"{name}={deltas.root / name}" for name in ("a", "b")]
    asked = [(("a", "b", "base")[i % 3], i // 3) for i in range(12)]
    with Server(deltas.root / "base", tmp_path / "log", *options) as server:
        assert answers(server, asked) == expected(deltas, asked)


def test_deltas_come_and_go_under_load(deltas, many):
    asked = [("base", i) for i in range(8)] * 2
    assert many.load("a", deltas.root / "a")[0] == 200
    asked += [("a", i) for i in range(8)]
    enough = Event()

    def traffic() -> int:
        rounds = 0
        while not (rounds and enough.is_set()):
            assert answers(many, asked) == expected(deltas, asked)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(traffic)
        try:
            assert many.load("b", deltas.root / "b")[0] == 200
            assert many.complete("b", PROMPTS[0], TOKENS) == deltas.continued("b")[0]
            assert many.unload("b")[0] == 200
        finally:
            enough.set()
        assert busy.result() >= 1
    assert many.post("/v1/completions", model="b", prompt=PROMPTS[0])[0] == 404
    assert many.unload("a")[0] == 200


def test_more_deltas_than_there_is_room_for(deltas, two, tmp_path):
    third = shutil.copytree(deltas.root / "a", tmp_path / "third")
    assert two.load("third", third)[0] == 200  # the one used longest ago makes room
    asked = [(("a", "b")[i % 2], i // 2) for i in range(8)]
    names = {"a": "third", "b": "b"}
    assert answers(two, [(names[m], i) for m, i in asked]) == expected(deltas, asked)
    assert answers(two, asked) == expected(deltas, asked)  # and comes back
    two.unload("third")


def test_a_delta_that_made_room_outlives_its_folder(deltas, two, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "third")
    assert two.load("third", repo)[0] == 200
    asked = [("a", 0), ("b", 0)]
    assert answers(two, asked) == expected(deltas, asked)  # which take its place
    (repo / "config.json").write_text("{}")
    assert answers(two, [("third", 1), ("base", 1)]) == expected(deltas, [("a", 1), ("base", 1)])
    two.unload("third")


def test_an_unknown_delta_is_not_found(two):
    status, body = two.post("/v1/completions", model="c", prompt=PROMPTS[0])
    assert status == 404 and "`c` does not exist" in body


def test_what_is_no_delta_of_this_base_is_refused(deltas, two, tmp_path):
    status, body = two.load("c", deltas.root / "tuned-a")
    assert status == 500 and "is not a delta repo: it holds a whole model" in body
    other = shutil.copytree(deltas.root / "a", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    prints = config["quantization_config"]["base_fingerprints"]
    prints[min(prints)] = "0" * 32
    (other / "config.json").write_text(json.dumps(config))
    status, body = two.load("c", other)
    assert status == 500 and "wrong base: 1 of 28 tensors" in body
    assert answers(two, [("a", 0)]) == expected(deltas, [("a", 0)])  # and it serves on


def test_the_prefix_cache_is_each_deltas_own(deltas, two):
    (prompt,) = token_ids(1, 100, seed=5).tolist()  # three blocks and a bit
    before = hits(two)
    for name in ("a", "b", "base"):  # none finds what another left
        assert two.complete(name, prompt, 16) == deltas.generated(name, [prompt], 16)[0]
        assert hits(two) == before
    for name in ("a", "b", "base"):
        assert two.complete(name, prompt, 16) == deltas.generated(name, [prompt], 16)[0]
    assert hits(two) == before + 3 * 96


def hits(server: Server) -> float:
    """Tokens that were found in the prefix cache."""
    lines = server.get("/metrics").splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total")
    )


def test_other_weights_under_a_name_that_the_prefix_cache_knows(deltas, many, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "repo")
    assert many.load("x", repo)[0] == 200
    assert many.unload("x")[0] == 200
    shutil.rmtree(repo)
    shutil.copytree(deltas.root / "b", repo)
    status, body = many.load("x", repo)
    assert status == 500 and "has changed since it was loaded as 'x'" in body
    assert many.load("y", repo)[0] == 200
    assert answers(many, [("y", 1)]) == expected(deltas, [("b", 1)])
    many.unload("y")


def test_log_probabilities_of_prompts_are_each_deltas_own(two):
    """The head then sees tokens of prompts, not only the last ones."""
    options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

    def asked(model: str) -> list[float]:
        status, body = two.post("/v1/completions", model=model, prompt=PROMPTS[2], **options)
        assert status == 200, body
        tokens = json.loads(body)["choices"][0]["prompt_logprobs"]
        return [next(iter(token.values()))["logprob"] for token in tokens[1:]]

    alone = [asked("a"), asked("b")]
    with ThreadPoolExecutor(8) as pool:
        both = list(pool.map(asked, ["a", "b"] * 4))
    assert alone[0] != alone[1]
    for i, found in enumerate(both):
        assert found == pytest.approx(alone[i % 2], abs=1e-4)


def test_adapters_beside_a_delta_repo_are_refused(deltas, tmp_path):
    server = Server(deltas.root / "a", tmp_path / "log", "--enable-lora")
    assert "serve their base with --quantization deltamix" in server.output()
    assert server.process.returncode != 0
