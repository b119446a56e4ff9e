"""Packed deltas of random factors for tests."""

from __future__ import annotations

import pytest
import torch

from deltamix_hf.quantization.gaussian import GAUSSIAN
from deltamix_hf.quantization.gptq import round_rows
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.quantization.quantizer import Quantizer
from deltamix_hf.quantization.uniform import MIN_MAX

each_codebook = pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])


def quantizer(gaussian: bool) -> Quantizer:
    return GAUSSIAN if gaussian else MIN_MAX


def both(group_size):
    """Group sizes of V and U; a single one is meant for both."""
    return group_size if isinstance(group_size, tuple) else (group_size, group_size)


def random_factors(m, n, v_bits, u_bits, group_size, seed=0, gaussian=False):
    """Rounded V̂ [k, n] and Ûᵀ [k, m] of normal values."""
    random = torch.Generator().manual_seed(seed)
    return [
        round_rows(
            torch.randn(len(bits), length, generator=random),
            torch.tensor(bits, dtype=torch.int64),
            size,
            quantizer(gaussian),
        )
        for bits, length, size in zip((v_bits, u_bits), (n, m), both(group_size), strict=True)
    ]


def pack(
    m, n, v_bits, u_bits, group_size, seed=0, gaussian=False
) -> tuple[PackedDelta, torch.Tensor]:
    """The packed factors and the delta [m, n] they must stand for, float64."""
    v, u = random_factors(m, n, v_bits, u_bits, group_size, seed, gaussian)
    return PackedDelta.pack(v, u), u.dequantize().double().T @ v.dequantize().double()
