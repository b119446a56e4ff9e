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


def measured(model: Path, names: list[str], *options: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = ("--dtype", "bfloat16", "--skip-tokenizer-init", *options)
        with Server(model, Path(folder) / "log", *options) as server:
            for name in names:
                server.complete(name, list(range(10, 26)), 8)
            return megabytes(server.process.pid)


def main() -> None:
    base, delta, dense, *rest = sys.argv[1:]
    count = int(rest[0]) if rest else 8
    one = measured(Path(dense), ["dense"], "--served-model-name", "dense")
    print(f"a dense model: {one:,.0f} MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"delta{i}" for i in range(count)]
        copies = [shutil.copytree(delta, Path(folder) / name) for name in names]
        options = ["--quantization", "deltamix", "--served-model-name", "base"]
        alone = measured(Path(base), ["base"], *options)
        print(f"the base, without deltas: {alone:,.0f} MB", flush=True)
        options += ["--enable-lora", "--max-loras", str(count), "--lora-modules"]
        options += [f"{name}={path}" for name, path in zip(names, copies, strict=True)]
        many = measured(Path(base), ["base", *names], *options)
    print(f"the base and {count} deltas: {many:,.0f} MB; {count} dense models: {count * one:,.0f}")


if __name__ == "__main__":
    main()
