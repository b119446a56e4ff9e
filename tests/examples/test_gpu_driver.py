"""The driver of the one GPU call survives whatever its steps do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")
GOOD = 'print(\'{"figure": 7}\'); print("some words"); print(\'{"ok": true}\')'


def step(name: str, code: str, limit: float = 10) -> gpu.Step:
    return gpu.Step(name, limit, (sys.executable, "-c", code))


def run(steps, out: Path, deadline: float = 60):
    outcomes = gpu.run_steps(steps, out, deadline, dict(os.environ))
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return outcomes, rows


@pytest.mark.parametrize(
    "code, state",
    [
        ("raise ValueError('no')", "exit 1"),
        ("import os; os.kill(os.getpid(), 11)", "exit -11"),
        ("import time; print('{\"figure\": 1}', flush=True); time.sleep(60)", "killed at 1 s"),
        ("import os\nos.close(1); os.close(2)\nwhile True: pass", "killed at 1 s"),
        ("while True: print('x' * 1000)", "killed at 1 s"),
        ("import os; os.write(1, bytes(range(256)) * 4000 + b'{' * 100000)", "exit 0"),
        ("print('{\"a\": '); print('{}}'); print('{' + '[' * 9000); print('[1]')", "exit 0"),
    ],
    ids=["raises", "crashes", "hangs", "hangs in silence", "floods", "binary", "half JSON"],
)
def test_a_bad_step_costs_only_itself(tmp_path, code, state):
    outcomes, rows = run([step("bad", code, 1), step("good", GOOD)], tmp_path)
    assert [outcome.state for outcome in outcomes] == [state, "exit 0"]
    assert [row for row in rows if row["step"] == "good" and "state" not in row] == [
        {"step": "good", "figure": 7},
        {"step": "good", "ok": True},
    ]
    assert "some words" in (tmp_path / "log.txt").read_text(errors="replace")
    assert (tmp_path / "log.txt").stat().st_size < 1.1 * gpu.LOG_BYTES
    assert "good" in gpu.summary(outcomes)
    hung = "hang" in code or "sleep" in code
    assert not hung or {"step": "bad", "figure": 1} in rows


def test_no_such_program(tmp_path):
    outcomes, _ = run([gpu.Step("none", 5, ("/no/such/program",)), step("good", GOOD)], tmp_path)
    assert "No such file" in outcomes[0].state and outcomes[1].good


def test_children_of_a_step_go_with_it(tmp_path):
    """Also where they hold its output open after it has left."""
    sleeper = "import time; time.sleep(60)"
    code = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {sleeper!r}]).pid, flush=True)
"""
    started = time.monotonic()
    outcomes, _ = run([step("parent", code)], tmp_path)
    assert outcomes[0].state == "exit 0" and time.monotonic() - started < 8
    child = int((tmp_path / "log.txt").read_text().split()[-1])
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


def test_one_deadline_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    slow = "import time; time.sleep(60)"
    started = time.monotonic()
    outcomes, _ = run([step("slow", slow), step("late", GOOD)], tmp_path, deadline=2)
    assert time.monotonic() - started < 6
    assert [o.state for o in outcomes] == ["killed at 2 s", "no time left"]


def test_summary_tells_failures_first_and_fits(tmp_path):
    code = """
import json
for i in range(300):
    print(json.dumps({"ok": i != 299, "error": "e" * 500}))
"""
    outcomes, _ = run([step(f"step{i}", code) for i in range(3)], tmp_path)
    text = gpu.summary(outcomes)
    assert len(text) <= gpu.SUMMARY_CHARACTERS + 10 and not outcomes[0].good
    assert text.count('"ok": false') == 3 and text.splitlines()[-1].startswith("BAD step2")
    assert "   1 bad of 300 rows" in text


@pytest.mark.parametrize("row", [{"ok": False}, {"ok": False, "figure": 1}])
def test_what_counts_as_bad(tmp_path, row):
    outcomes, _ = run([step("some", f"import json; print(json.dumps({row!r}))")], tmp_path)
    assert outcomes[0].state == "exit 0" and not outcomes[0].good


def test_a_step_that_fails_says_why(tmp_path):
    outcomes, _ = run([step("bad", "raise ValueError('this is why')")], tmp_path)
    assert "ValueError: this is why" in gpu.summary(outcomes)


def test_every_step_is_there_and_runs_without_a_gpu(tmp_path):
    for one in gpu.STEPS:
        assert (gpu.ROOT / one.command[1]).is_file(), one.name
    for name in load("gpu_tests").FILES:
        assert (gpu.ROOT / f"tests/{name}.py").is_file(), name
    assert len({one.name for one in gpu.STEPS}) == len(gpu.STEPS)
    command = [sys.executable, str(FOLDER / "gpu.py"), str(tmp_path), "versions", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0]["torch"] and rows[-1]["state"] == "exit 0"


IMPORTS = """
import ast, importlib, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
for path in sorted(folder.glob("*.py")):
    try:
        importlib.import_module(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.unparse(node), path.name, "exec"), {})
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in ("vllm", "gemlite"):  # rivals, not installed here
            print(path.name, error)
    except BaseException as error:
        print(path.name, repr(error))
print("all")
"""


def test_every_script_can_be_imported():
    """With what its functions import, too."""
    command = [sys.executable, "-c", IMPORTS, str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all\n", done.stdout + done.stderr


def test_unknown_step():
    command = [sys.executable, str(FOLDER / "gpu.py"), "out", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "there are ['versions'" in done.stderr


CASES = """
import os, sys, time
sys.path.insert(0, {folder!r})
import cases

def good():
    yield {{"figure": 1}}

def bad():
    yield {{"ok": False}}
    raise ValueError("what was wrong")

def crash():
    os.kill(os.getpid(), 11)
    yield {{}}

def hang():
    time.sleep(60)
    yield {{}}

found = {{"bad": bad, "crash": crash, "hang": hang, "good": good, "more": good}}
cases.serve(found) if "--worker" in sys.argv else cases.run(list(found), 2, 3)
"""


def test_cases_apart(tmp_path):
    script = tmp_path / "some_cases.py"
    script.write_text(CASES.format(folder=str(FOLDER)))
    outcomes, rows = run([gpu.Step("cases", 60, (sys.executable, str(script)))], tmp_path)
    found = {(row["case"], row["ok"]): row for row in rows if "case" in row}
    assert outcomes[0].state == "exit 0" and ("good", True) in found and ("more", True) in found
    assert "what was wrong" in found["bad", False]["error"]
    assert found["crash", False]["error"] == "the worker died: exit -11"
    assert found["hang", False]["error"] == "killed after 3 s"


@pytest.mark.parametrize("gaussian", [True, False])
def test_random_factors_have_the_library_s_layout(gaussian, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    factors = load("factors")
    made = factors.random_factors(40, 72, [(2, 4, 4), (3, 2, 2)], "cpu", 0, (0, 0), gaussian)
    assert made.rank == 5 and (made.zeros is None) == gaussian
    assert made.dense().shape == (40, 72) and made.dense().isfinite().all()
