"""A public peer beside our own methods: `deltatensors` 0.2.0 (PyPI, MIT), run as its users run it.

It stores a delta of every tensor, changed or not, in one file, by one of three strategies:

quantized   sign(ΔW), one float16 scale a row (a vector is one row): the one near 1/16
sparse      the largest values in float32 at int64 positions, 12 bytes for each kept weight
int4        the largest in float16 at int64 positions, all others on one 4-bit min-max grid a tensor

Only its public API is called, and only bytes on disk are counted.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "deltatensors==0.2.0"


class PeerSkipped(RuntimeError):
    """The peer cannot be run here; the message says why."""


def deltatensors(
    finetuned: Path, base: Path, file: Path, strategy: str, **options: Any
) -> tuple[dict[str, Tensor], int]:
    """Save the delta between two model folders to `file` and load it back.

    `options` are the strategy's: `sparsity` of "sparse", `outlier_fraction` of "int4".
    Returns the restored checkpoint, tensor name -> float32, and the bytes of `file`.

    Raises:
        PeerSkipped: the package is not installed, or refuses this pair of folders.
    """
    try:
        import deltatensors as peer
    except ImportError as error:
        raise PeerSkipped(
            f"the peer deltatensors is not installed: pip install --no-deps {PACKAGE}"
        ) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            peer.save_delta_from_paths(file, finetuned, base, strategy, use_gpu=False, **options)
            arrays = peer.load_delta_from_paths(file, base)
    except (ValueError, KeyError) as error:
        raise PeerSkipped(f"deltatensors cannot store {finetuned}: {error}") from error
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, file.stat().st_size
