"""Check the Triton kernels on a GPU in child processes, once for each machine.

After an illegal memory access or a hang, nothing more runs in a process that uses the GPU. So the
products of `self_check` run in children: one that crashes, hangs or computes something else costs
speed, and no wrong answers. A pass is cached in the user's cache folder for this GPU, driver,
torch, Triton and source of the kernels; after anything else the next process checks again.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

CASES = ("aligned bfloat16", "aligned float16", "odd bfloat16", "odd float16")  # a child each
LIMIT = 240.0  # seconds until a child is killed; nearly all of them go into compiling
# Of the largest output: bfloat16 keeps 3 digits. A wrong bit or scale is above 0.1.
TOLERANCE = 0.02
_COMMAND = (sys.executable, "-m", "deltamix_hf.ops.self_check")
_PASSED = b"passed\n"
_LONGEST = 300  # characters of what a child said


def kernels_work(
    device: torch.device, kernels: Path, command: Sequence[str] = _COMMAND, limit: float = LIMIT
) -> bool:
    """Return whether the kernels run on this GPU and are right there; log a warning if not.

    Args:
        kernels: folder of their source.
        command: starts a child; the device and a case are appended.
        limit: seconds until a child is killed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamix_hf"
    passed = cache / f"kernels-{_fingerprint(device, kernels)}"
    with suppress(OSError):
        if passed.read_bytes() == _PASSED:
            return True
    logger.warning(
        "checking the Triton kernels on %s before they are first used on such a GPU; "
        "this takes about a minute, once", device,
    )  # fmt: skip
    with ThreadPoolExecutor(len(CASES)) as pool:
        found = list(pool.map(partial(_failure, device, command, limit), CASES))
    reasons = [f"{case}: {reason}" for case, reason in zip(CASES, found, strict=True) if reason]
    if not reasons:
        with suppress(OSError):  # a folder that cannot be written costs a check in the next process
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            passed.write_bytes(_PASSED)
        return True
    logger.warning(
        "the Triton kernels do not work on %s (%s); plain torch runs instead, which is slow. "
        "Please report this.", device, "; ".join(dict.fromkeys(reasons)),
    )  # fmt: skip
    return False


def _failure(device: torch.device, command: Sequence[str], limit: float, case: str) -> str:
    """Run a case in a child; return what is wrong, "" if nothing is."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                [*command, str(device), case],
                stdin=subprocess.DEVNULL,
                stdout=out,  # no pipe, which a child of the child could hold open
                stderr=err,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {limit:.0f} s"
        except OSError as error:
            return f"cannot start a process: {error}"
        if done.returncode:
            return f"exit {done.returncode}: {_last_line(err) or _last_line(out)}"
        try:
            off = float(_last_line(out))
        except ValueError:
            return f"it said {_last_line(out)!r}"
    return "" if off <= TOLERANCE else f"products are off by {off:.2g} of the largest"


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][-_LONGEST:] if lines else ""


def _fingerprint(device: torch.device, kernels: Path) -> str:
    """Hash all that a pass depends on."""
    digest = hashlib.sha256()
    for source in sorted([*kernels.rglob("*.py"), *kernels.rglob("*.json")]):
        digest.update(source.read_bytes())
    digest.update(Path(__file__).with_name("self_check.py").read_bytes())
    gpu: list[object] = []
    if device.type == "cuda":
        gpu = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    driver, triton = "", ""
    with suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    with suppress(PackageNotFoundError):
        triton = version("triton")
    digest.update(repr([*gpu, driver, torch.__version__, torch.version.cuda, triton]).encode())
    return digest.hexdigest()[:32]
