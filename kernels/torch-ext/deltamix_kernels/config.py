"""Tile sizes, as JSON data: `configs/<device name>.json` where someone tuned them, else default.

fused_rows: up to how many rows one launch makes the base's product and expand, at most 16; 0 for
Triton's interpreter, whose time goes by programs, of which that launch has eight times as many.
"8" and "16": decoding, by rows of x a program takes. UNROLL: loads in flight a thread. WARPS: of a
program. COLUMNS: byte columns of a program. Of `dequantize`: R ranks and C byte columns of a tile.
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


@lru_cache(maxsize=64)
def config(device: torch.device) -> dict[str, Any]:
    """All settings for a device."""
    return read(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
