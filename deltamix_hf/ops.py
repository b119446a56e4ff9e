"""The one operation the rest of the code calls: y += ((x·V̂ᵀ)·Ûᵀ) from packed factors.

Registered as torch custom ops so that `torch.compile(fullgraph=True)` sees one opaque node. The
implementation here is the plain-torch reference and the CPU path; device kernels register with
`low_rank.register_kernel("cuda")` (kernels/ is their place).

Both factors are stored rank-major, so the same op with its two sides swapped is its own backward:
dL/dx = (g·Û)·V̂. No gradient flows to the packed factors, they are frozen integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import codebook, grid, packing
from .packed import PackedFactors, row_bits, zero_points


def _unflatten(runs: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(runs[0::3], runs[1::3], runs[2::3], strict=True))


@torch.library.custom_op("deltamix::low_rank", mutates_args=())
def low_rank(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    ranks: Tensor,
    zeros: Tensor | None,
    runs: list[int],
    m: int,
    n: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    """x [..., n] -> [..., m] in x's dtype; `transposed` maps [..., m] -> [..., n] instead.

    `runs` is the flattened list of (count, v_bits, u_bits); see `packed.py` for the tensors.
    """
    factors = PackedFactors(m, n, group_size, _unflatten(runs), v, u, ranks, zeros)
    right, left = factors.right().to(x.dtype), factors.left().to(x.dtype)
    if transposed:
        right, left = left, right
    with torch.autocast(x.device.type, enabled=False):  # the fake below promises x's dtype
        return x @ right.T @ left


@low_rank.register_fake
def _(x, v, u, ranks, zeros, runs, m, n, group_size, transposed):
    return x.new_empty(*x.shape[:-1], n if transposed else m)


def _setup_context(ctx, inputs, output):
    _, v, u, ranks, zeros, runs, m, n, group_size, transposed = inputs
    ctx.save_for_backward(v, u, ranks, zeros)
    ctx.layout = (runs, m, n, group_size, not transposed)


def _backward(ctx, grad):
    return (low_rank(grad, *ctx.saved_tensors, *ctx.layout),) + (None,) * 9


low_rank.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("deltamix::low_rank_rows", mutates_args=())
def low_rank_rows(
    index: Tensor,
    v: Tensor,
    u: Tensor,
    ranks: Tensor,
    zeros: Tensor | None,
    runs: list[int],
    m: int,
    n: int,
    group_size: int,
) -> Tensor:
    """Rows `index` (int64, any shape, values below m) of Û·V̂: float32 [*index.shape, n]."""
    triples = _unflatten(runs)
    right = PackedFactors(m, n, group_size, triples, v, u, ranks, zeros).right()
    sides = [(c, b) for c, _, b in triples]
    flat = index.reshape(-1)
    codes = packing.unpack_columns(u, sides, flat)
    own_group = flat // group_size if group_size else torch.zeros_like(flat)
    group = grid.group_count(n, group_size) + own_group
    scales = grid.scales_from_bits(ranks[:, 1:].contiguous())[:, group]
    if zeros is None:
        left = codebook.decode(codes, row_bits(sides, codes)[:, None]) * scales
    else:
        # int16, not uint8: code - zero may be negative
        points = zero_points(zeros, triples, ranks.shape[1] - 1)[:, group].to(torch.int16)
        left = (codes.to(torch.int16) - points) * scales
    with torch.autocast(index.device.type, enabled=False):
        return (left.T @ right).reshape(*index.shape, n)


@low_rank_rows.register_fake
def _(index, v, u, ranks, zeros, runs, m, n, group_size):
    return torch.empty(*index.shape, n, dtype=torch.float32, device=index.device)
