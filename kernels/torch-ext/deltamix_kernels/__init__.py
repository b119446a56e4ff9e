"""Triton kernels for a frozen matrix plus a packed mixed-precision low-rank delta."""

from .config import DECODE_ROWS
from .decode_plan import DECODE_DTYPES, DecodePlan, decodable
from .grouped_launch import Rows, Table, gather, grouped_add, grouped_embed
from .launch import INTERPRETED, Packed, delta_linear, dequantize, low_rank, supported
from .persistent import persistent

__all__ = [
    "DECODE_DTYPES",
    "DECODE_ROWS",
    "INTERPRETED",
    "DecodePlan",
    "Packed",
    "Rows",
    "Table",
    "decodable",
    "delta_linear",
    "dequantize",
    "gather",
    "grouped_add",
    "grouped_embed",
    "low_rank",
    "persistent",
    "supported",
]
