"""Build `native.c` at first use, with the system's C compiler, into the user's cache folder.

The library's name is a hash of the source, the flags and all that the compiler defines for them,
its version and the instructions of this machine among it: a home that several machines share holds
one for each. It is written under a temporary name and renamed when it has passed its check, so two
processes may build at once, and nothing that a compiler left half-written is ever found.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
LIMIT = 120.0  # seconds until a compiler is killed; it takes five on one core
_FLAGS = ("-O2", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared")
_X86 = ("x86_64", "AMD64", "amd64")
_LONGEST = 200  # characters of what a compiler said
# How torch's own threads are called on this machine; a second pool of them would wait in turns.
_THREADS = re.compile(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", re.M)

logger = logging.get_logger(__name__)

Check = Callable[[ctypes.CDLL], None]


class Unusable(Exception):
    """Why there is no native op; its text ends a sentence."""


def build(
    check: Check,
    compilers: Sequence[str] = COMPILERS,
    flags: Sequence[str] = (),
    folder: Path | None = None,
    limit: float = LIMIT,
) -> ctypes.CDLL:
    """Load the library of this source and machine, built if there is none yet.

    Args:
        check: raises `Unusable` for a library that computes something else.
        flags: more of them for the compiler, behind ours.
        folder: where it is kept; by default in the user's cache.
        limit: seconds until a compiler is killed.

    Raises:
        Unusable: no compiler, a folder that is not ours alone, a compiler that fails or hangs, or
            a library that does not load or pass the check.
    """
    if os.name != "posix" or sys.maxsize < 2**32:
        raise Unusable(f"it is not made for {platform.system()} on {platform.machine()}")
    compiler = next((path for name in compilers if (path := shutil.which(name))), None)
    if compiler is None:
        raise Unusable(f"there is no C compiler ({', '.join(compilers)})")
    flags = (*_FLAGS, *(("-march=native",) if platform.machine() in _X86 else ()), *flags)
    defined = _run([compiler, *flags, "-dM", "-E", "-xc", os.devnull], limit)
    threads = _shared_threads()
    if threads and b"__clang__" not in defined:  # whose own threads are seldom installed
        flags = (*flags, "-fopenmp")
    digest = hashlib.sha256(repr(flags).encode() + defined + SOURCE.read_bytes()).hexdigest()
    folder = _own_folder(folder or _cache())
    library = folder / f"native-{digest[:32]}.so"
    if library.exists():
        with suppress(Unusable):  # damaged: built anew
            return _loaded(library, check)
    logger.warning("building the native op for deltas on a CPU, once; this takes some seconds")
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as temporary:
            made = Path(temporary) / "native.so"
            _run([compiler, *flags, "-o", str(made), str(SOURCE), "-lm"], limit)
            found = _loaded(made, check)
            made.replace(library)
    except OSError as error:
        raise Unusable(f"{folder} cannot be written: {error.strerror}") from error
    return found


def _cache() -> Path:
    try:
        home = Path.home()
    except RuntimeError as error:
        raise Unusable("the user has no home folder") from error
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "deltamix_hf" / "native"


def _own_folder(folder: Path) -> Path:
    """Make the folder, which nobody else may write: what is in it is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise Unusable(f"{folder} cannot be made: {error.strerror}") from error
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or others:
        raise Unusable(f"{folder} is not a folder that only this user can write")
    return folder


def _run(command: list[str], limit: float) -> bytes:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unusable(f"{command[0]} was not done after {limit:.0f} s") from error
    except OSError as error:
        raise Unusable(f"{command[0]} does not start: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        line = next((line for line in said if "error" in line), said[-1])[:_LONGEST]
        raise Unusable(f"{command[0]} ended with {done.returncode}: {line}")
    return done.stdout


def _shared_threads() -> str:
    """Return the OpenMP library that torch runs on, "" if none is known here."""
    with suppress(OSError):
        found = _THREADS.search(Path("/proc/self/maps").read_text(errors="replace"))
        return found.group(1) if found else ""
    return ""


def _loaded(library: Path, check: Check) -> ctypes.CDLL:
    """Load a library and check it."""
    if threads := _shared_threads():
        with suppress(OSError):
            ctypes.CDLL(threads, ctypes.RTLD_GLOBAL)  # its names are found before any other's
    try:
        found = ctypes.CDLL(str(library))
        check(found)
    except (OSError, AttributeError) as error:
        raise Unusable(f"what the compiler wrote does not load: {error}"[:_LONGEST]) from error
    return found
