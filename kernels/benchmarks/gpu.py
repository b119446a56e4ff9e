"""Run everything that needs a GPU, in one call: correctness, times, the library end to end.

    python kernels/benchmarks/gpu.py OUT [STEP ...] [--deadline 540] [--tiny] [--list]

Every step is a process of its own with a limit of its own, in order of worth, all under one
deadline; one that fails, hangs, crashes or prints rubbish costs only itself. Lines of a step that
are JSON objects are appended to OUT/results.jsonl at once, all else to OUT/log.txt; a summary comes
last. Wheels in .whl/ are installed into a temporary folder first. `--tiny` runs the small form of
every step on a CPU, in Triton's interpreter. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[2]
HERE = "kernels/benchmarks/"
LEAST = 5.0  # seconds left under which no step is started
LOG_BYTES, RESULT_BYTES = 400_000, 1_000_000  # of one step
LONGEST_LINE = 64_000
SUMMARY_CHARACTERS = 10_500  # the caller sees the last 12,000 of the output


@dataclass(frozen=True)
class Step:
    """A command that prints JSON lines.

    `tiny` are the arguments of its small form on a CPU, or None if it has none.
    """

    name: str
    limit: float  # seconds
    command: tuple[str, ...]
    tiny: tuple[str, ...] | None = ("--tiny",)


def python(script: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, script, *arguments


STEPS = (  # in order of worth
    Step("versions", 30, python(HERE + "versions.py")),
    Step("compile", 60, python(HERE + "sweep.py", "compile"), None),
    Step("ceilings", 30, python(HERE + "ceilings.py")),
    Step("correct", 75, python(HERE + "correct.py")),
    Step("kernels", 45, python(HERE + "decode_gpu.py", "kernels"), ("--rows", "1")),
    Step("ncu", 45, python(HERE + "decode_gpu.py", "ncu"), ()),
    Step("sweep", 60, python(HERE + "sweep.py", "tune"), ()),
    Step("tenants", 40, python(HERE + "tenants.py")),
    Step("layer", 60, python(HERE + "bench.py", "--rows", "1", "4", "16")),
    Step("library", 120, python(HERE + "end_to_end.py")),
    Step("model", 120, python(HERE + "whole_model.py")),
    Step(
        "prefill",
        40,
        python(HERE + "bench.py", "--rows", "64", "2048"),
        ("--tiny", "--ways", "base", "reference"),
    ),
    Step(
        "compress",
        90,
        python("examples/bench_quality/block_7b.py", "--device", "cuda"),
        ("--device", "cpu", "--hidden", "128", "--tokens", "256"),
    ),
    Step("gputests", 125, python(HERE + "gpu_tests.py")),
)


@dataclass
class Outcome:
    name: str
    state: str
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    last: str = ""  # lines that are no JSON

    @property
    def good(self) -> bool:
        return self.state == "exit 0" and not any(map(is_bad, self.rows))


def is_bad(row: dict) -> bool:
    return not row.get("ok", True)


class Sorter:
    """Splits a step's output: JSON objects to `results`, all else to `log`, both bounded."""

    def __init__(self, name: str, results: BinaryIO, log: BinaryIO):
        self.name, self.results, self.log = name, results, log
        self.rows: list[dict] = []
        self.last: deque[bytes] = deque(maxlen=4)  # lines that are no JSON
        self._rest = b""
        self._log_left, self._results_left = LOG_BYTES, RESULT_BYTES

    def feed(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > LONGEST_LINE:
            self.finish()

    def finish(self) -> None:
        if self._rest:
            self._line(self._rest)
        self._rest = b""

    def _line(self, line: bytes) -> None:
        row = _json_object(line)
        if row is None or len(line) > self._results_left:
            text = line[: self._log_left] + b"\n"
            self._log_left = max(0, self._log_left - len(text))
            if len(text) > 1:
                self.log.write(text)
                self.last.append(text.rstrip()[-300:])
            return
        self._results_left -= len(line)
        self.rows.append(row)
        self.results.write(json.dumps({"step": self.name, **row}).encode() + b"\n")


def _json_object(line: bytes) -> dict | None:
    if not line.startswith(b"{") or len(line) > LONGEST_LINE:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def run_step(step: Step, limit: float, env: dict[str, str], sorter: Sorter) -> str:
    """Run one step; returns how it ended. All its processes are gone then."""
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    assert process.stdout is not None
    pipe, end, state = process.stdout.fileno(), time.monotonic() + limit, ""
    while not state:
        ready, _, _ = select.select([pipe], [], [], 0.1)
        chunk = os.read(pipe, 1 << 16) if ready else b""
        sorter.feed(chunk)
        if time.monotonic() > end:
            state = f"killed at {limit:.0f} s"
        elif process.poll() is not None and not chunk:  # not at the pipe's end: others may hold it
            state = f"exit {process.returncode}"
        elif ready and not chunk:
            time.sleep(0.05)  # closed its output and runs on
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    sorter.finish()
    return state


def run_steps(
    steps: Sequence[Step], out: Path, deadline: float, env: dict[str, str]
) -> list[Outcome]:
    """Run the steps in order until `deadline` seconds have passed since the call."""
    out.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), []
    with (
        (out / "results.jsonl").open("ab", buffering=0) as results,
        (out / "log.txt").open("ab", buffering=0) as log,
    ):
        for step in steps:
            left = deadline - (time.monotonic() - began)
            if left < LEAST:
                outcomes.append(Outcome(step.name, "no time left"))
                continue
            log.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
            started, sorter = time.monotonic(), Sorter(step.name, results, log)
            state = run_step(step, min(step.limit, left), env, sorter)
            last = b"\n".join(sorter.last).decode(errors="replace")
            outcome = Outcome(step.name, state, time.monotonic() - started, sorter.rows, last)
            outcomes.append(outcome)
            row = {"step": step.name, "state": state, "seconds": round(outcome.seconds, 1)}
            results.write(json.dumps(row).encode() + b"\n")
            print(f"{step.name:10s} {outcome.seconds:6.1f} s  {state}", flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """Failures and the last figures of every step, then a line a step."""
    lines = []
    for outcome in outcomes:
        failed = [row for row in outcome.rows if is_bad(row)]
        figures = [row for row in outcome.rows if not is_bad(row) and "ok" not in row]
        told = [json.dumps(row)[:330] for row in failed[:20] + figures[-24:]]
        told += [outcome.last] if outcome.state != "exit 0" and outcome.last else []
        lines += [f"-- {outcome.name}", *told] if told else []
    table = [
        f"{'ok' if o.good else 'BAD':4s}{o.name:12s}{o.seconds:6.1f} s  {o.state:18s}"
        f"{sum(map(is_bad, o.rows)):4d} bad of{len(o.rows):4d} rows"
        for o in outcomes
    ]
    room = SUMMARY_CHARACTERS - len("\n".join(table))
    return "\n".join(["\n".join(lines)[:room], "", *table])


def install_wheels(wheels: list[Path], site: str) -> str:
    """Install them into `site`; returns what went wrong, if anything."""
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", site]
    command += map(str, wheels)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr[-500:] if done.returncode else ""


def environment(scratch: str, tiny: bool) -> dict[str, str]:
    """What every step runs with; nothing may reach for the network."""
    paths = [f"{scratch}/site", str(ROOT), str(ROOT / "kernels" / "torch-ext")]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": f"{scratch}/triton",  # shared: what one step compiled, others find
        "TRITON_INTERPRET": "1" if tiny else "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all, in order of worth")
    parser.add_argument("--deadline", type=float, default=540, help="seconds for all of them")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--list", action="store_true", help="name the steps and stop")
    options = parser.parse_args()
    began = time.monotonic()
    by_name = {step.name: step for step in STEPS}
    if unknown := set(options.steps) - by_name.keys():
        parser.error(f"no step {sorted(unknown)}; there are {list(by_name)}")
    steps = [by_name[name] for name in options.steps or by_name]
    if options.list:
        for step in steps:
            print(f"{step.name:12s}{step.limit:5.0f} s  {' '.join(step.command[1:])}")
        return 0
    if options.tiny:
        steps = [
            Step(s.name, 10 * s.limit, (*s.command, *s.tiny)) for s in steps if s.tiny is not None
        ]
    # kept, so that a second call on the same machine finds the kernels compiled
    scratch = str(Path(tempfile.gettempdir()) / "deltamix-gpu")
    wheels = sorted((ROOT / ".whl").glob("*.whl"))
    if wheels and not options.tiny and (error := install_wheels(wheels, f"{scratch}/site")):
        print(f"wheels were not installed: {error}", flush=True)
    left = options.deadline - (time.monotonic() - began)
    outcomes = run_steps(steps, options.out, left, environment(scratch, options.tiny))
    print(summary(outcomes), flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
