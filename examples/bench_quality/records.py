"""Records of runs on disk: one JSON file each, written whole or not at all.

<results>/quality/runs/<pair>/<id>.json   one run
<results>/quality/pairs/<pair>.json       base and fine-tune, measured once
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def write(path: Path, record: dict[str, Any]) -> None:
    """Write beside, then rename; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps(_plain(record), indent=1, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def run_path(results: Path, pair: str, run_id: str) -> Path:
    return results / "quality" / "runs" / pair / f"{run_id}.json"


def pair_path(results: Path, pair: str) -> Path:
    return results / "quality" / "pairs" / f"{pair}.json"


def read_runs(results: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted((results / "quality" / "runs").glob("*/*.json"))]


def read_pairs(results: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: read(p) for p in sorted((results / "quality" / "pairs").glob("*.json"))}


def circumstances() -> dict[str, Any]:
    """When, where and with what."""
    packages = ("deltamix-hf", "torch", "transformers")
    return {
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "commit": _commit(),
    }


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of this checkout, "+" where the package has uncommitted changes."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "deltamix_hf")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
