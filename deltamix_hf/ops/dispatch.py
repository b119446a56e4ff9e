"""Choose what runs a packed product: the Triton kernels, the native op or plain torch.

The environment variable DELTAMIX_KERNEL, "triton", "native" or "reference", decides. If it is not
set, the device does: the kernels on a GPU and the native op on a CPU where they work, plain torch
elsewhere.

Before the kernels are first used on a GPU, `isolated_check` compares them with float64 in processes
of their own. A GPU, driver or Triton that they do not work on costs speed, and no wrong answers.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from ..errors import DeltaMixError, first_line
from ..quantization.packed_delta import PackedDelta
from . import native
from .isolated_check import kernels_work
from .packed_op import state_of

VARIABLE = "DELTAMIX_KERNEL"
TRITON, NATIVE, REFERENCE = "triton", "native", "reference"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x and the base weight

logger = logging.get_logger(__name__)
T = TypeVar("T")

_passed: dict[int | None, bool] = {}
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by `v`, which lives with its model


def choose(device: torch.device, passed: dict[int | None, bool] = _passed) -> str:
    """Return the implementation for tensors on `device`.

    `passed`: GPU -> whether the kernels work there, as far as it has been tried. Raises
    DeltaMixError for an unknown name, or if one is asked for where it cannot run.
    """
    name = os.environ.get(VARIABLE)
    if name is None:
        if device.type == "cpu":
            # a compiler that traces sees the ops, in which this is asked again
            tracing = torch.compiler.is_compiling()
            return REFERENCE if tracing or native.library() is None else NATIVE
        return TRITON if _trusted(device, passed) else REFERENCE
    if name not in (known := (TRITON, NATIVE, REFERENCE)):
        raise DeltaMixError(f"kernel {name!r} ({VARIABLE}): choose one of {', '.join(known)}")
    if name == NATIVE and (device.type != "cpu" or native.library() is None):
        raise DeltaMixError(
            f"the native op cannot run on {device.type} here: choose {REFERENCE!r}, or unset "
            f"{VARIABLE}"
        )
    if name == TRITON and not _runs_triton(device):
        raise DeltaMixError(
            f"the Triton kernels cannot run on {device.type}: install triton and use a CUDA "
            f"device, or choose {REFERENCE!r}"
        )
    return name


def _import_kernels() -> Any:
    """Import `deltamix_kernels`; None without a Triton that it knows, which is said."""
    try:
        import deltamix_kernels
    except ImportError as error:
        if error.name != "triton":  # absent is nothing to tell
            logger.warning("no Triton kernels: %s", first_line(error))
        return None
    return deltamix_kernels


_kernels = _import_kernels()


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


def persistent(device: torch.device, make: Callable[[], T]) -> T:
    """Return `make()`, tensors that outlive the call, also where a compiled model warms up.

    Raises DeltaMixError if a CUDA graph is being recorded.
    """
    if capturing(device):
        raise DeltaMixError(
            "a CUDA graph cannot make what the kernels read: run the model once, without "
            "gradients, before recording"
        )
    return make() if _kernels is None else _kernels.persistent(device, make)


def table_of(
    packed: PackedDelta, dtype: torch.dtype, embedding: bool = False
) -> tuple[Any, Tensor] | None:
    """Return the kernels' table of a matrix or of all experts, and its slots, int32 [experts or 1].

    It is made anew when the codes have moved or changed; see `persistent`. None: not for kernels.
    """

    def make() -> tuple[Any, Tensor] | None:
        device, factors = packed.v.device, packed.untied().split()  # forgotten with `packed.v`
        table = triton_kernels().Table(len(factors), packed.m, packed.n, device, embedding)
        known = all(
            own is None or table.put(number, kernel_packed(own), dtype)
            for number, own in enumerate(factors)
        )
        slots = torch.arange(len(factors), dtype=torch.int32, device=device)
        return (table, slots) if known else None

    of = [dtype, embedding, *map(state_of, packed.tensors.values())]
    found = _tables.get(packed.v)
    if found is None or found[0] != of:
        found = _tables[packed.v] = of, persistent(packed.v.device, make)
    return found[1]


def _trusted(device: torch.device, passed: dict[int | None, bool]) -> bool:
    """Whether the kernels work on this GPU; tried the first time that it can be."""
    if device.type != "cuda" or not _runs_triton(device):
        return False
    if device.index not in passed:
        # not while a compiler traces, with fake tensors or without, and not within a CUDA graph
        tracing = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
        if tracing or (torch.cuda.is_available() and capturing(device)):
            return False
        passed[device.index] = kernels_work(device, Path(triton_kernels().__file__).parent)
    return passed[device.index]


def _runs_triton(device: torch.device) -> bool:
    kernels = triton_kernels()
    return kernels is not None and (device.type == "cuda" or kernels.INTERPRETED)
