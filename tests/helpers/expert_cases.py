"""Packed experts of random factors for tests."""

from __future__ import annotations

import torch
from packed_cases import quantizer

from deltamix_hf.quantization.gptq import round_rows
from deltamix_hf.quantization.packed_delta import PackedDelta

M, N = 24, 40


def factors(
    v_bits: list[int], u_bits: list[int], gaussian: bool, seed: int = 0, group: int = 0
) -> PackedDelta:
    """Random ranks of an [M, N] matrix with these widths."""
    random = torch.Generator().manual_seed(seed)
    right = torch.randn(len(v_bits), N, generator=random)
    left = torch.randn(len(u_bits), M, generator=random)
    v = round_rows(right, torch.tensor(v_bits), group, quantizer(gaussian))
    u = round_rows(left, torch.tensor(u_bits), group, quantizer(gaussian))
    return PackedDelta.pack(v, u)


def some_experts(gaussian: bool = True) -> list[PackedDelta | None]:
    """Five experts of unlike ranks and widths, one without any."""
    return [
        factors([8, 3, 2], [8, 2, 2], gaussian, 0),
        None,
        factors([2], [3], gaussian, 1),
        factors([4, 4, 3, 2, 2], [4, 2, 2, 8, 2], gaussian, 2),
        factors([8], [8], gaussian, 3),
    ]
