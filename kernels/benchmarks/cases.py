"""Run named cases in worker processes, side by side, so that none can harm another.

A case yields dicts, which are printed as JSON lines with its name and "ok". A worker that hangs is
killed, one whose case raised is replaced: after an illegal memory access nothing runs in it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

Case = Callable[[], Iterator[dict]]
PYTHON = sys.executable
_GOOD, _BAD = b"+", b"-"
_LONGEST_ERROR = 700


def tell(**row: object) -> None:
    """Print one JSON line in one write: workers share the pipe, and leave lines unfinished."""
    os.write(1, f"\n{json.dumps(row)}\n".encode())


def last_lines(error: BaseException) -> str:
    """What was raised, where, and by what."""
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames))
    return f"{text[-_LONGEST_ERROR:]} [{where}]"


def serve(cases: dict[str, Case]) -> None:
    """A worker: run the cases whose names come in, until one raises."""
    for line in sys.stdin:
        name, failed = line.strip(), False
        started = time.perf_counter()
        try:
            for row in cases[name]():
                tell(case=name, **{"ok": True, **row}, at=round(time.perf_counter() - started, 1))
        except BaseException as error:
            failed = True
            tell(case=name, ok=False, error=last_lines(error))
        sys.stdout.flush()
        os.write(int(os.environ["CASES_DONE"]), _BAD if failed else _GOOD)
        if failed:
            os._exit(0)  # a broken CUDA context may hang in an orderly exit


class _Worker:
    """A process that runs `serve`, told a case at a time."""

    def __init__(self, command: Sequence[str]):
        self.pipe, theirs = os.pipe()
        env = {**os.environ, "CASES_DONE": str(theirs)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=env, pass_fds=[theirs], text=True
        )
        os.close(theirs)

    def run(self, name: str, limit: float) -> bool:
        """Whether the worker can take another case."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            tell(case=name, ok=False, error="the worker died before the case began")
            return False
        ready, _, _ = select.select([self.pipe], [], [], limit)
        if not ready:
            tell(case=name, ok=False, error=f"killed after {limit:.0f} s")
            return False
        told = os.read(self.pipe, 1)
        if not told:
            tell(case=name, ok=False, error=f"the worker died: exit {self.process.wait()}")
        return told == _GOOD

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.pipe)


def run(
    names: Sequence[str], workers: int, limit: float, command: Sequence[str] | None = None
) -> None:
    """Run the cases in this order, `workers` at a time, each for `limit` seconds at most.

    `command` starts a worker; default: this program with --worker.
    """
    command = command or [PYTHON, *sys.argv, "--worker"]
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in names:
        waiting.put(name)

    def work() -> None:
        worker = None
        while True:
            try:
                name = waiting.get_nowait()
            except Empty:
                break
            worker = worker or _Worker(command)
            if not worker.run(name, limit):
                worker.stop()
                worker = None
        if worker:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
