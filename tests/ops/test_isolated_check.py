"""The kernels are checked in children; whatever those do, the user's process goes on."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE

from deltamix_hf.ops import dispatch, isolated_check, self_check
from deltamix_hf.ops.isolated_check import CASES, TOLERANCE, kernels_work

SOURCE = Path(dispatch.triton_kernels().__file__).parent
RIGHT = "print('some words'); print(0.003)"
# (what a child does, what the warning says)
BAD = {
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit -11"),
    "raises": ("raise RuntimeError('an illegal memory access')", "RuntimeError: an illegal memory"),
    "hangs": ("import time; time.sleep(60)", "not done after 1 s"),
    "rubbish": ("print('\\x00' * 9 + 'rubbish')", "it said"),
    "silence": ("", "it said ''"),
    "wrong": ("print(0.4)", "off by 0.4 of the largest"),
    "nan": ("print(float('nan'))", "off by nan"),
    "one wrong": ("import sys; print(0.4 if 'odd float16' in sys.argv else 0.0)", "odd float16: "),
}


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "deltamix_hf")
    return tmp_path / "cache" / "deltamix_hf"


def check(code: str, limit: float = 60) -> bool:
    return kernels_work(DEVICE, SOURCE, command(code), limit)


def test_a_pass_is_announced_and_remembered(cache, caplog):
    assert check(RIGHT)
    assert caplog.text.count("WARNING") == 1 and "checking the Triton kernels" in caplog.text
    assert cache.stat().st_mode & 0o777 == 0o700 and len(list(cache.iterdir())) == 1
    caplog.clear()
    assert check("raise SystemExit(1)") and not caplog.records  # nothing was run


@pytest.mark.parametrize("code, reason", BAD.values(), ids=list(BAD))
def test_a_bad_child_costs_speed_only(cache, caplog, code, reason):
    started = time.monotonic()
    assert not check(code, 1 if "sleep" in code else 60)
    assert time.monotonic() - started < 30
    assert reason in caplog.text and "plain torch runs instead" in caplog.text
    assert caplog.text.count("WARNING") == 2  # it begins, and what came of it
    assert check(RIGHT)  # failures are not remembered


def test_no_process_can_be_started(caplog):
    assert not kernels_work(DEVICE, SOURCE, ["/no/such/program"])
    assert "cannot start a process" in caplog.text


@pytest.mark.parametrize("content", [b"", b"pass", b"\xff\xfe", b"failed\n"])
def test_a_damaged_cache_means_another_check(cache, content):
    assert check(RIGHT)
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    assert not check("print(1.0)") and check(RIGHT)
    assert entry.read_bytes() == b"passed\n"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check(RIGHT) and not check("print(1.0)")


@pytest.mark.parametrize("what", ["kernels", "torch", "triton"])
def test_what_a_pass_depends_on(monkeypatch, tmp_path, what):
    (tmp_path / "a.py").write_text("1")
    before = isolated_check._fingerprint(DEVICE, tmp_path)
    assert before == isolated_check._fingerprint(DEVICE, tmp_path)
    if what == "kernels":
        (tmp_path / "a.py").write_text("2")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(isolated_check, "version", lambda name: "9.9")
    assert before != isolated_check._fingerprint(DEVICE, tmp_path)


def test_children_find_the_same_packages_and_get_device_and_case(tmp_path):
    code = f"""
import importlib.util, os, sys
assert importlib.util.find_spec("deltamix_kernels").origin == {str(SOURCE / "__init__.py")!r}
if sys.argv[2] == {CASES[0]!r}:
    import deltamix_kernels, deltamix_hf
open(os.path.join({str(tmp_path)!r}, sys.argv[2]), "w").write(sys.argv[1])
print(0.0)
"""
    assert check(code, 300)
    assert {name: (tmp_path / name).read_text() for name in CASES} == dict.fromkeys(
        CASES, str(DEVICE)
    )
    assert os.environ.get("PYTHONSAFEPATH") is None


@pytest.mark.untraced
def test_the_kernels_pass():
    found = list(self_check.errors("odd float16", DEVICE, (1, 80)))
    # A layer and a table at either number of rows, two layers of one input at one, an embedding.
    assert len(found) == 2 * 2 + 2 + 1 and max(found) <= TOLERANCE


@pytest.mark.untraced
def test_a_wrong_kernel_does_not_pass(monkeypatch):
    kernels = dispatch.triton_kernels()

    def wrong(right):
        def run(*arguments):
            found = right(*arguments)
            for y in [arguments[0]] if found is None else found if type(found) is list else [found]:
                y.mul_(0.9)
            return found

        return run

    for owner, name in (
        (kernels, "delta_linear"),
        (kernels, "grouped_add"),
        (kernels, "grouped_embed"),
        (kernels.DecodePlan, "linear"),
    ):
        monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert min(self_check.errors("odd float16", DEVICE, (1, 80))) > TOLERANCE


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_on_this_gpu():
    assert kernels_work(torch.device("cuda", 0), SOURCE)
