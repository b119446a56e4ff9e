"""Tile sizes, as JSON data: `configs/<device name>.json` where someone tuned them, else default.

R: ranks of a tile. C: byte columns (8 elements each) at a time. M: rows of x at a time (decode: the
next power of two from 16). K: inputs of the base product at a time. splits: programs that share the
input columns of a rank tile. programs and row_programs: of the grouped kernels, at most how many
share a delta's rank tiles and its rows. All but these three are powers of two, and `tl.dot` needs
R, 8·C, M and K of at least 16.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

if not hasattr(triton, "knobs"):
    raise ImportError(f"deltamix_kernels needs triton 3.4 or newer, found {triton.__version__}")

_FOLDER = Path(__file__).parent / "configs"
# Above, the factors are unpacked into memory once and the products are the vendor's GEMM.
DECODE_ROWS = 64


@lru_cache(maxsize=64)
def read(device_name: str) -> dict[str, Any]:
    tuned = _FOLDER / f"{device_name.replace(' ', '_')}.json"
    chosen = tuned if tuned.exists() else _FOLDER / "default.json"
    return json.loads(chosen.read_text(encoding="utf-8"))


def config(device: torch.device, rows: int, kernel: str) -> dict[str, int]:
    """Settings of a kernel for `rows` rows of x; M is filled in.

    Of one delta, few rows have "shrink" and "expand", many have "dequantize".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stage = "decode" if rows <= DECODE_ROWS else "prefill"
    found = dict(read(name)[stage][kernel])
    found.setdefault("M", max(16, 1 << (rows - 1).bit_length()))
    return found
