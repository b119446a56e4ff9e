"""Which implementation runs a packed product: the Triton kernels or plain torch.

An explicit argument wins over the environment variable DELTAMIX_KERNEL; both take "triton" or
"reference". Otherwise it is plain torch, on a GPU too: the kernels are held against float64 by
Triton's interpreter and compile for an H100, but no GPU has run them yet.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .errors import DeltaMixError

VARIABLE = "DELTAMIX_KERNEL"
TRITON, REFERENCE = "triton", "reference"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x and the base weight


def choose(device: torch.device, wanted: str | None = None) -> str:
    """The implementation for tensors on `device`.

    Raises:
        DeltaMixError: an unknown name, or Triton asked for where it cannot run.
    """
    name = wanted or os.environ.get(VARIABLE)
    if name is None:
        return REFERENCE
    if name not in (TRITON, REFERENCE):
        raise DeltaMixError(
            f"kernel {name!r} ({VARIABLE} or an argument): choose {TRITON!r} or {REFERENCE!r}"
        )
    if name == TRITON and not _runs_triton(device):
        raise DeltaMixError(
            f"the Triton kernels cannot run on {device.type}: install triton and use a CUDA "
            f"device, or choose {REFERENCE!r}"
        )
    return name


try:
    import deltamix_kernels as _kernels
except ImportError:  # no Triton
    _kernels = None


def triton_kernels() -> Any:
    """The package `deltamix_kernels`, or None without Triton."""
    return _kernels


def _runs_triton(device: torch.device) -> bool:
    kernels = triton_kernels()
    return kernels is not None and (device.type == "cuda" or kernels.INTERPRETED)
