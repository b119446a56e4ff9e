"""Triton kernels for a frozen matrix plus a packed mixed-precision low-rank delta."""

from .config import DECODE_ROWS
from .grouped_launch import Rows, Table, gather, grouped_add, grouped_embed
from .launch import (
    INTERPRETED,
    Packed,
    delta_linear,
    dequantize,
    expand,
    finish_linear,
    low_rank,
    shrink,
    split_columns,
    supported,
)
from .layout import runs_of

__all__ = [
    "DECODE_ROWS",
    "INTERPRETED",
    "Packed",
    "Rows",
    "Table",
    "delta_linear",
    "dequantize",
    "expand",
    "finish_linear",
    "gather",
    "grouped_add",
    "grouped_embed",
    "low_rank",
    "runs_of",
    "shrink",
    "split_columns",
    "supported",
]
