"""Random packed deltas, made on the device: packing real factors of 7B layers takes too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from deltamix_kernels import Packed
from shapes import MODELS, Linear, block, runs
from torch import Tensor

from deltamix_hf.quantization.gaussian import GAUSSIAN
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.quantization.packed_layout import exponent_of, part_shapes
from deltamix_hf.quantization.uniform import MIN_MAX

EVERY = [(3, bits, 9 - bits) for bits in range(8, 0, -1)]  # every width on either side
MIXED = [(2, 8, 8), (3, 8, 4), (5, 4, 3), (9, 3, 2), (18, 2, 2)]


TINY = block(32, 16, 32)  # the interpreter takes a second for a few thousand weights


def groups(linears: Sequence[Linear] = MODELS["Llama-3-8B"]) -> list[list[Linear]]:
    """Layers that read the same input, in order."""
    return [list(some) for _, some in groupby(linears, key=lambda linear: linear.reads)]


def random_factors(
    m: int,
    n: int,
    layout: Sequence[tuple[int, int, int]],
    device: torch.device,
    seed: int,
    group_sizes: tuple[int, int] = (0, 0),
    gaussian: bool = True,
    size: float = 1.0,
) -> PackedDelta:
    """Random codes and scales: a delta whose outputs are about `size` of a base's with std n^-1/2.

    Codes of padding are random too: nothing may depend on them. On "meta", where nothing has a
    value, they only have shapes.
    """
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)
    shapes = part_shapes(m, n, list(layout), group_sizes, GAUSSIAN if gaussian else MIN_MAX)
    tensors = {
        part: torch.randint(256, shape, dtype=torch.uint8, device=device, generator=random)
        for part, shape in shapes.items()
        if part != "ranks"
    }
    rank, fields = shapes["ranks"]
    typical = (size**2 / (n * rank)) ** 0.25
    scales = typical * (0.5 + torch.rand(rank, fields - 1, device=device, generator=random))
    words = [(v + 16 * u + 256 * exponent_of(group_sizes), c, v) for c, v, u in layout]
    widths = torch.tensor([w for w, c, _ in words for _ in range(c)], dtype=torch.int16)
    if not gaussian:  # differences of codes are about 0.4 · 2^bits
        bits = torch.tensor([b for _, c, b in words for _ in range(c)], device=device)
        scales /= 0.4 * 2.0 ** bits[:, None]
    stored = scales.bfloat16().view(torch.int16)
    ranks = torch.cat([widths.to(device)[:, None], stored], 1)
    return PackedDelta(m, n, group_sizes, list(layout), ranks=ranks, **tensors)


def layer_factors(linear: Linear, device: torch.device, seed: int) -> PackedDelta:
    """A delta of 1/16 of the layer's bytes, whose outputs are a tenth of the base's."""
    return random_factors(linear.m, linear.n, runs(linear), device, seed, size=0.1)


def random_packed(linear: Linear, device: torch.device, seed: int = 0) -> Packed:
    return kernel_form(layer_factors(linear, device, seed))


def kernel_form(factors: PackedDelta) -> Packed:
    tensors = factors.v, factors.u, factors.ranks, factors.zeros
    return Packed(*tensors, tuple(factors.runs), factors.m, factors.n, factors.group_sizes)


@contextmanager
def poisoned() -> Iterator[None]:
    """Context manager: fresh tensors begin as NaN, so that an element no program writes shows."""
    empty = Tensor.new_empty

    def new_empty(self: Tensor, *shape: object, **kwargs: object) -> Tensor:
        made = empty(self, *shape, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    Tensor.new_empty = new_empty
    try:
        yield
    finally:
        Tensor.new_empty = empty


def exact(factors: PackedDelta, x: Tensor, transposed: bool = False) -> Tensor:
    """x times the delta in float64."""
    right, left = factors.right().double(), factors.left().double()
    if transposed:
        right, left = left, right
    return x.double() @ right.T @ left
