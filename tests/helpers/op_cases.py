"""Arguments and tolerances for tests of the custom ops."""

from __future__ import annotations

import torch

# Relative RMS error of (x·V̂ᵀ)·Ûᵀ against float64: the two factors and the product in between are
# each rounded to the dtype (eps/√3 RMS or so per rounding), three roundings in a row.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def arguments(packed, transposed=None):
    tensors = packed.v, packed.u, packed.ranks, packed.zeros
    flat = [number for run in packed.runs for number in run]
    tail = () if transposed is None else (transposed,)
    return *tensors, flat, packed.m, packed.n, list(packed.group_sizes), *tail


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())
