"""Building the native op: what goes wrong ends in one line, and look-ups run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from op_cases import arguments, relative
from packed_cases import pack

from deltamix_hf import DeltaMixError
from deltamix_hf.ops import dispatch, native, native_build
from deltamix_hf.ops.low_rank import low_rank
from deltamix_hf.ops.native_build import Unusable, build

QUICK = ("-O0",)  # to compile: two seconds, not seven
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
RIGHT = shutil.which("cc") or ""
# What a compiler does instead, and what is said.
BAD = {
    "fails": ("echo 'x.c: error: no such thing' >&2; exit 3", "ended with 3: x.c: error: no such"),
    "is silent": ("exit 1", "ended with 1: nothing"),
    "hangs": ("sleep 60", "not done after 1 s"),
    "hangs later": (f'case "$*" in *-dM*) exec {RIGHT} "$@";; *) sleep 60;; esac', "not done"),
    "writes rubbish": (
        f'case "$*" in *-dM*) exec {RIGHT} "$@";; esac\n'
        'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"',
        "does not load",
    ),
    "writes nothing": ("exit 0", "does not load"),
    "writes something else": (
        f'case "$*" in *-dM*) exec {RIGHT} "$@";; esac\n'
        f'while [ "$1" != -o ]; do shift; done; echo "int a;" | {RIGHT} -shared -xc - -o "$2"',
        "does not load",
    ),
}


@pytest.fixture
def compiler(tmp_path):
    def make(script: str) -> str:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


@needs_compiler
@pytest.mark.parametrize("script, reason", BAD.values(), ids=list(BAD))
def test_a_bad_compiler_is_one_line(compiler, tmp_path, script, reason):
    cache = tmp_path / "cache"
    with pytest.raises(Unusable, match=reason) as error:
        build(native._check, [compiler(script)], folder=cache, limit=1.0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not list(cache.glob("*")) if cache.exists() else True


@needs_compiler
def test_wrong_products_are_noticed(tmp_path, monkeypatch):
    text = native_build.SOURCE.read_text()
    wrong = tmp_path / "native.c"
    wrong.write_text(text.replace("return scale;", "return 2 * scale;"))
    monkeypatch.setattr(native_build, "SOURCE", wrong)
    with pytest.raises(Unusable, match="off by"):
        build(native._check, flags=QUICK, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_no_compiler_no_posix_no_home(monkeypatch, tmp_path):
    with pytest.raises(Unusable, match=r"no C compiler \(cc-of-nobody\)"):
        build(native._check, ["cc-of-nobody"], folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setattr(Path, "home", homeless)
        with pytest.raises(Unusable, match=r"no C compiler|no home folder"):
            build(native._check)
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(Unusable, match="not made for"):
        build(native._check)


def homeless():
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
def test_a_folder_that_is_not_ours_is_not_used(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(Unusable, match="not a folder that only this user can write"):
        build(native._check, folder=shared)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(Unusable, match="not a folder that only"):
        build(native._check, folder=link)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(Unusable, match="cannot be made"):
        build(native._check, folder=file / "cache")
    assert not list(shared.iterdir())


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_not_used(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 12345, 12345)
    with pytest.raises(Unusable, match="not a folder that only this user can write"):
        build(native._check, folder=theirs)


@needs_compiler
def test_a_library_is_kept_and_a_damaged_one_made_anew(tmp_path):
    build(native._check, flags=QUICK, folder=tmp_path)
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    build(native._check, flags=QUICK, folder=tmp_path)
    assert library.stat().st_mtime_ns == made
    other = tmp_path / "other" / library.name
    other.parent.mkdir(mode=0o700)
    other.write_bytes(b"\x7fELF" + bytes(100))
    build(native._check, flags=QUICK, folder=other.parent)
    assert other.stat().st_size > 10_000 and list(other.parent.iterdir()) == [other]


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from deltamix_hf.ops import native, native_build\n"
        "native_build.build(native._check, flags=('-O0',), folder=Path(sys.argv[1]))\n"
        "print('built')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate(timeout=240)[0] for child in both] == ["built\n"] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


@needs_compiler
def test_fewer_instructions_pass_the_same_check(tmp_path):
    if os.uname().machine not in native_build._X86:
        pytest.skip("flags of x86")
    build(native._check, flags=("-mno-avx2", "-mno-fma", *QUICK), folder=tmp_path)


def test_without_it_look_ups_run_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def none(check):
        raise Unusable("there is no C compiler (cc)")

    monkeypatch.setattr(native, "build", none)
    native._found.clear()
    try:
        packed, delta = pack(33, 65, [4, 3, 2], [8, 3, 2], 0, gaussian=True)
        x = torch.randn(2, 65)
        assert dispatch.choose(x.device) == dispatch.REFERENCE
        for _ in range(2):
            found = low_rank(x, *arguments(packed, False))
            assert relative(found, x.double() @ delta.T) < 1e-6
        assert caplog.text.count("no native op for deltas on a CPU: there is no C compiler") == 1
        monkeypatch.setenv(dispatch.VARIABLE, dispatch.NATIVE)
        with pytest.raises(DeltaMixError, match="the native op cannot run on cpu here"):
            dispatch.choose(x.device)
    finally:
        native._found.clear()


@needs_compiler
def test_threads_that_ask_first_build_once(monkeypatch):
    built = []
    monkeypatch.setattr(native, "build", lambda check: built.append(1) or object())
    native._found.clear()
    try:
        threads = [threading.Thread(target=native.library) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(built) == 1
    finally:
        native._found.clear()
