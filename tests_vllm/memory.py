"""Memory of a vLLM server with a base and N deltas, and of one with a dense model.

    python tests_vllm/memory.py BASE DELTA DENSE [N]

Every delta is the same repo, copied to a path of its own: so each is read and held anew. Memory is
the proportional set size of all processes of the server, after each model has answered once.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from server import Server


def megabytes(session: int) -> float:
    """Proportional set size of all processes of a session, in 1e6 bytes."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getsid(int(process.name)) == session:
                for line in (process / "smaps_rollup").read_text().splitlines():
                    total += int(line.split()[1]) if line.startswith("Pss:") else 0
        except (OSError, ProcessLookupError):  # it ended meanwhile
            continue
    return total * 1024 / 1e6


def main() -> None:
    base, delta, dense, *rest = sys.argv[1:]
    count = int(rest[0]) if rest else 8
    common = ["--dtype", "bfloat16", "--skip-tokenizer-init", "--served-model-name", "model"]
    prompt = list(range(10, 26))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with Server(Path(dense), log, *common) as server:
            server.complete("model", prompt, 8)
            one = megabytes(server.process.pid)
        options = ["--quantization", "deltamix", "--enable-lora", "--max-loras", str(count)]
        with Server(Path(base), log, *common, *options) as server:
            server.complete("model", prompt, 8)
            alone = megabytes(server.process.pid)
            for i in range(count):
                server.load(f"delta{i}", shutil.copytree(delta, Path(folder) / f"delta{i}"))
                server.complete(f"delta{i}", prompt, 8)
            many = megabytes(server.process.pid)
    print(f"a dense model: {one:,.0f} MB; {count} of them: {count * one:,.0f} MB")
    print(f"the base: {alone:,.0f} MB; and {count} deltas: {many:,.0f} MB")


if __name__ == "__main__":
    main()
