"""Run the tests that use a GPU where there is one; JSON lines of counts and of what failed.

    python kernels/benchmarks/gpu_tests.py [--tiny] [FILE ...]

Failures are told as they come and counts every few seconds, so that a run that is killed has said
what it knew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "ops/test_isolated_check", "ops/test_dequantize", "ops/test_decode_kernels",
    "ops/test_dispatch", "ops/test_grouped_kernels", "ops/test_expert_kernels",
    "ops/test_low_rank", "multi_delta/test_grouped", "nn/test_shared_input", "nn/test_layers",
)  # fmt: skip
EVERY = 5.0  # seconds between two counts


class Teller:
    """A pytest plugin that prints JSON lines."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.told = self.began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.counts["failed" if report.when == "call" else "errors"] += 1
            text = str(report.longrepr)
            marked = [line for line in text.splitlines() if line.startswith("E ")]
            error = "\n".join(marked or text.splitlines())[-600:]
            _tell(ok=False, test=report.nodeid, when=report.when, error=error)
        elif report.when == "call" or report.skipped:
            self.counts["skipped" if report.skipped else "passed"] += 1
        if time.monotonic() - self.told > EVERY:
            self.count()

    def pytest_sessionfinish(self) -> None:
        self.count(finished=True)

    def count(self, finished: bool = False) -> None:
        self.told = time.monotonic()
        seconds = round(self.told - self.began, 1)
        _tell(counts=dict(self.counts), finished=finished, seconds=seconds)


def _tell(**row: object) -> None:
    os.write(1, f"\n{json.dumps(row)}\n".encode())  # pytest leaves lines unfinished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="one file, in one process")
    options = parser.parse_args()
    files = options.files or [f"tests/{name}.py" for name in FILES]
    workers = ["-n", "12"]
    if options.tiny:
        files, workers = ["tests/ops/test_dispatch.py"], ["-n", "2"]
    arguments = ["-q", "-p", "no:cacheprovider", "--timeout", "80", "--tb", "short", *workers]
    os.chdir(ROOT)
    teller = Teller()
    return int(pytest.main([*arguments, *files], plugins=[teller]))


if __name__ == "__main__":
    raise SystemExit(main())
