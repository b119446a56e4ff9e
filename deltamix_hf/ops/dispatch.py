"""Choose which implementation runs a packed product: the Triton kernels or plain torch.

An explicit argument wins over the environment variable DELTAMIX_KERNEL; both take "triton" or
"reference". Otherwise the device decides: the kernels on a GPU where they work, plain torch
elsewhere.

The kernels try themselves on a GPU, once, before they are first used there: small products with a
delta of every width the default method makes, by every path there is (one row, a few, many; one
delta or a table of them), against float64. A GPU, driver or Triton that they do not work on costs
speed then, and no wrong answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ..errors import DeltaMixError
from ..quantization.packed_delta import PackedDelta

VARIABLE = "DELTAMIX_KERNEL"
TRITON, REFERENCE = "triton", "reference"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x and the base weight


_passed: dict[int | None, bool] = {}


def choose(
    device: torch.device, wanted: str | None = None, passed: dict[int | None, bool] = _passed
) -> str:
    """Return the implementation for tensors on `device`.

    Args:
        passed: GPU -> whether the kernels work there, as far as it has been tried.

    Raises:
        DeltaMixError: an unknown name, or Triton asked for where it cannot run.
    """
    name = wanted or os.environ.get(VARIABLE)
    if name is None:
        return TRITON if _trusted(device, passed) else REFERENCE
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
    """Return the package `deltamix_kernels`, or None without Triton."""
    return _kernels


def kernel_packed(packed: PackedDelta) -> Any:
    """Wrap packed factors as the kernels take them; the tensors are shared."""
    tensors = packed.v, packed.u, packed.ranks, packed.zeros
    layout = tuple(packed.runs), packed.m, packed.n, packed.group_sizes
    return triton_kernels().Packed(*tensors, *layout)


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _trusted(device: torch.device, passed: dict[int | None, bool]) -> bool:
    """Whether the kernels work on this GPU; tried the first time that it can be."""
    if device.type != "cuda" or not _runs_triton(device):
        return False
    if device.index not in passed:
        if not _can_launch():
            return False
        passed[device.index] = kernels_work(device)
    return passed[device.index]


def _can_launch() -> bool:
    """Not while a compiler traces, with fake tensors or without, and not within a CUDA graph."""
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _runs_triton(device: torch.device) -> bool:
    kernels = triton_kernels()
    return kernels is not None and (device.type == "cuda" or kernels.INTERPRETED)


logger = logging.get_logger(__name__)

_M, _N = 70, 136  # no multiples of a tile
_RUNS = [(2, 8, 8), (3, 8, 4), (5, 4, 3), (9, 3, 2), (18, 2, 2)]
_ROWS = (1, 16, 80)
# Of the largest output: bfloat16 keeps 3 digits. A wrong bit or scale is above 0.1.
TOLERANCE = 0.02


def kernels_work(device: torch.device) -> bool:
    """Try the kernels on this GPU: whether they run and are right; log a warning if not."""
    try:
        error = max(_errors(device))
    except Exception as failure:  # whatever a driver or compiler may raise
        reason = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    else:
        if error <= TOLERANCE:
            return True
        reason = f"their products are off by {error:.2g} of the largest"
    logger.warning(
        "the Triton kernels do not work on %s (%s); plain torch runs instead, which is slow. "
        "Please report this.", device, reason,
    )  # fmt: skip
    return False


@torch.no_grad()
def _errors(device: torch.device) -> Iterator[float]:
    """The error of each product as a share of the largest output."""
    random = torch.Generator().manual_seed(0)
    delta = _delta(random)
    weight = torch.randn(_M, _N, generator=random).to(torch.bfloat16)
    whole = (weight.double() + delta.dense().double()).T
    k, packed, weight = triton_kernels(), kernel_packed(delta.to(device)), weight.to(device)
    table = k.Table(1, _M, _N, device)
    table.put(0, packed)
    for rows in _ROWS:
        x = torch.randn(rows, _N, generator=random).to(torch.bfloat16)
        expected, x = x.double() @ whole, x.to(device)
        together = F.linear(x, weight)
        order, starts = torch.arange(rows), torch.tensor([0, rows])
        plan = (t.to(device, torch.int32) for t in (order, starts, torch.zeros(1)))
        k.grouped_add(together, x, table, k.Rows(*plan), None)
        for found in (k.delta_linear(x, weight, None, packed), together):
            yield _distance(found.cpu(), expected)


def _delta(random: torch.Generator) -> PackedDelta:
    """Random codes, about as large a delta as the weights."""
    v_rows, u_rows = (sum(run[0] * run[side] for run in _RUNS) for side in (1, 2))
    v = torch.randint(256, (v_rows, -(-_N // 8)), dtype=torch.uint8, generator=random)
    u = torch.randint(256, (u_rows, -(-_M // 8)), dtype=torch.uint8, generator=random)
    count = sum(run[0] for run in _RUNS)
    scales = torch.full((count, 3), count**-0.25, dtype=torch.bfloat16).view(torch.int16)
    return PackedDelta(_M, _N, (0, 0), _RUNS, v, u, scales)


def _distance(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))
