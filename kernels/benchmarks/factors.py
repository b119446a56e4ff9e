"""Random packed deltas, made on the device: packing real factors of 7B layers takes too long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deltamix_kernels import Packed
from torch import Tensor

from deltamix_hf.quantization.gaussian import GAUSSIAN
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.quantization.packed_layout import exponent_of, part_shapes
from deltamix_hf.quantization.uniform import MIN_MAX

EVERY = [(3, bits, 9 - bits) for bits in range(8, 0, -1)]  # every width on either side
MIXED = [(2, 8, 8), (3, 8, 4), (5, 4, 3), (9, 3, 2), (18, 2, 2)]


def random_factors(
    m: int,
    n: int,
    runs: Sequence[tuple[int, int, int]],
    device: torch.device,
    seed: int,
    group_sizes: tuple[int, int] = (0, 0),
    gaussian: bool = True,
    size: float = 1.0,
) -> PackedDelta:
    """Random codes and scales: a delta whose outputs are about `size` of a base's with std n^-1/2.

    Codes of padding are random too: nothing may depend on them.
    """
    random = torch.Generator(device).manual_seed(seed)
    shapes = part_shapes(m, n, list(runs), group_sizes, GAUSSIAN if gaussian else MIN_MAX)
    tensors = {
        part: torch.randint(256, shape, dtype=torch.uint8, device=device, generator=random)
        for part, shape in shapes.items()
        if part != "ranks"
    }
    rank, fields = shapes["ranks"]
    typical = (size**2 / (n * rank)) ** 0.25
    scales = typical * (0.5 + torch.rand(rank, fields - 1, device=device, generator=random))
    words = [(v + 16 * u + 256 * exponent_of(group_sizes), c, v) for c, v, u in runs]
    widths = torch.tensor([w for w, c, _ in words for _ in range(c)], dtype=torch.int16)
    if not gaussian:  # differences of codes are about 0.4 · 2^bits
        bits = torch.tensor([b for _, c, b in words for _ in range(c)], device=device)
        scales /= 0.4 * 2.0 ** bits[:, None]
    stored = scales.bfloat16().view(torch.int16)
    ranks = torch.cat([widths.to(device)[:, None], stored], 1)
    return PackedDelta(m, n, group_sizes, list(runs), ranks=ranks, **tensors)


def kernel_form(factors: PackedDelta) -> Packed:
    tensors = factors.v, factors.u, factors.ranks, factors.zeros
    return Packed(*tensors, tuple(factors.runs), factors.m, factors.n, factors.group_sizes)


def exact(factors: PackedDelta, x: Tensor, transposed: bool = False) -> Tensor:
    """x times the delta in float64."""
    right, left = factors.right().double(), factors.left().double()
    if transposed:
        right, left = left, right
    return x.double() @ right.T @ left
