"""`deltamix serve` started for real, asked over HTTP, and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.utils.import_utils
from tiny_pairs import make_tokenizer, text_of, token_ids
from transformers import AutoModelForCausalLM

from deltamix_hf import DeltaMixError, cli

PROMPT = token_ids(1, 8, seed=5)[0]
SECONDS = 120  # to start, on a busy machine


@pytest.fixture(scope="module")
def repo(delta, tmp_path_factory) -> Path:
    """A delta repo that one can chat with."""
    source = delta("llama").folder
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("served") / "repo"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(repo, tmp_path_factory) -> Iterator[str]:
    """Where the server listens; it must go at the first SIGINT."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    command = [sys.executable, "-m", "deltamix_hf", "serve", str(repo), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + SECONDS
        while not _healthy(f"http://localhost:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    finally:
        server.kill()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(url: str, repo: Path, **options: object) -> str:
    """Body of the answer to `PROMPT`, greedily."""
    message = {"role": "user", "content": text_of(PROMPT)}
    body = {"model": str(repo), "messages": [message], "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body | options).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return answer.read().decode()


def generated(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(PROMPT[None], max_new_tokens=6, do_sample=False)[0, len(PROMPT) :]
    return make_tokenizer().decode(ids, skip_special_tokens=True)


def test_an_answer_is_what_the_delta_generates(url, repo, delta):
    expected = generated(repo)
    assert expected != generated(delta("llama").pair.base)  # else serving the base would do
    answer = json.loads(ask(url, repo))
    assert answer["choices"][0]["message"]["content"] == expected


def test_a_streamed_answer_is_the_same(url, repo):
    lines = ask(url, repo, stream=True).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert len(deltas) > 2
    assert "".join(delta.get("content") or "" for delta in deltas) == generated(repo)


def test_without_a_server_installed_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: False)
    with pytest.raises(DeltaMixError, match=r'pip install "transformers\[serving\]"'):
        cli.app(["serve", "any"], standalone_mode=False)


def test_options_are_those_of_transformers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deltamix", "serve", "any", "--prot", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "No such option '--prot'" in capsys.readouterr().err
