"""`vllm serve` in a process of its own, and the requests that the tests send to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

WAIT = 240  # seconds until a server answers, on two slow cores


class Server:
    """A server of one model, up within the `with`."""

    def __init__(self, model: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        vllm = Path(sys.executable).parent / "vllm"
        arguments = [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(self.port)]
        # float32: the same tokens whatever shares the batch
        arguments += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", *options]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> Server:
        until = time.monotonic() + WAIT
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"vllm serve did not start:\n{self.log.read_text()[-5000:]}")

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End it with its workers: all of the session that was started for it."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def output(self) -> str:
        """What it printed until it ended by itself."""
        self.process.wait(WAIT)
        return self.log.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
            return reply.read().decode()

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        """HTTP status and body of the reply."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model: str, prompt: list[int], tokens: int) -> list[int]:
        """Token ids of a greedy completion."""
        status, body = self.post(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert status == 200, body
        return json.loads(body)["choices"][0]["token_ids"]

    def load(self, name: str, path: Path) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", lora_name=name)
