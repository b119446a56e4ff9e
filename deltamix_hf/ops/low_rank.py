"""The packed products the rest of the code calls, as torch custom ops.

`delta_linear` is one linear layer with its delta,

    y = x·W_baseᵀ + ((x·V̂ᵀ)·s)·Ûᵀ (+ bias),

`low_rank` the delta's part of it in either direction, `low_rank_rows` the rows an embedding looks
up. `torch.compile(fullgraph=True)` sees each as one opaque node. The plain-torch reference here is
also the CPU path; on a GPU the Triton kernels of `deltamix_kernels` run (see `dispatch.py`).

Both factors are stored rank-major, so `low_rank` with its two sides swapped is its own backward:
dL/dx = (g·Û)·V̂. No gradient flows to the packed factors, they are frozen integers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization import bitpacking, uniform
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import packed_runs, row_bits, scale_counts, zero_points
from . import lookup, native
from .dispatch import NATIVE, TRITON, TRITON_DTYPES, choose, kernel_packed, table_of, triton_kernels
from .packed_op import PACKED, packed_op


@packed_op("low_rank", "Tensor x", PACKED, "bool transposed")
def low_rank(x: Tensor, packed: PackedDelta, transposed: bool) -> Tensor:
    """Multiply x [..., n]: [..., m] in x's dtype; `transposed` maps [..., m] to [..., n]."""
    kernel = choose(x.device)
    if _by_triton(kernel, x, packed):
        return triton_kernels().low_rank(x, kernel_packed(packed), transposed)
    return _without_triton(kernel, x, packed, transposed)


def _without_triton(kernel: str, x: Tensor, packed: PackedDelta, transposed: bool) -> Tensor:
    quick = x.device.type == "cpu" and x.dtype != torch.float64  # whose factors are float32's
    if quick and (words := _native_words(kernel, x, packed)):
        flat = x.reshape(-1, x.shape[-1])
        y = native.products(flat, [(words[0], len(flat))], transposed)
        return y.view(*x.shape[:-1], y.shape[1])
    with torch.autocast(x.device.type, enabled=False):  # the fake below promises x's dtype
        if quick and lookup.supported(packed):
            y = lookup.low_rank(x.reshape(-1, x.shape[-1]), packed, transposed)
            return y.view(*x.shape[:-1], y.shape[1])
        right, left = packed.right().to(x.dtype), packed.left().to(x.dtype)
        if transposed:
            right, left = left, right
        return x @ right.T @ left


@low_rank.register_fake
def _(x, v, u, ranks, zeros, runs, m, n, group_sizes, transposed):
    return x.new_empty(*x.shape[:-1], n if transposed else m)


def _low_rank_context(ctx, inputs, output):
    _, v, u, ranks, zeros, *layout, transposed = inputs
    ctx.save_for_backward(v, u, ranks, zeros)
    ctx.layout = (*layout, not transposed)


def _low_rank_backward(ctx, grad):
    return (low_rank(grad, *ctx.saved_tensors, *ctx.layout),) + (None,) * 9


low_rank.register_autograd(_low_rank_backward, setup_context=_low_rank_context)


@packed_op("delta_linear", "Tensor x", "Tensor weight", "Tensor? bias", PACKED)
def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedDelta) -> Tensor:
    """Run a linear layer with its delta: x [..., n], weight [m, n], bias [m] -> [..., m]."""
    kernel = choose(x.device)
    if _by_triton(kernel, x, packed):
        return triton_kernels().delta_linear(x, weight, bias, kernel_packed(packed))
    y = F.linear(x, weight, bias)
    # not in place: y is a view of a matrix, and others may add to what they get in place
    return y + _without_triton(kernel, x, packed, False)


@delta_linear.register_fake
def _(x, weight, bias, v, u, ranks, zeros, runs, m, n, group_sizes):
    return x.new_empty(*x.shape[:-1], m)


def _linear_context(ctx, inputs, output):
    x, weight, _, v, u, ranks, zeros, *layout = inputs
    _, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    ctx.save_for_backward(x if wants_weight else None, weight, v, u, ranks, zeros)
    ctx.layout = (*layout, True)
    ctx.wants_bias = wants_bias


def _linear_backward(ctx, grad):
    x, weight, *packed = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = grad @ weight + low_rank(grad, *packed, *ctx.layout)
    flat = grad.flatten(0, -2)
    if x is not None:
        dw = flat.T @ x.flatten(0, -2)
    if ctx.wants_bias:
        db = flat.sum(0)
    return (dx, dw, db) + (None,) * 8


delta_linear.register_autograd(_linear_backward, setup_context=_linear_context)


def _by_triton(kernel: str, x: Tensor, packed: PackedDelta) -> bool:
    """The kernels know three dtypes and scale groups of 16·i elements; the rest is torch's."""
    if kernel != TRITON:
        return False
    return x.dtype in TRITON_DTYPES and triton_kernels().supported(packed.group_sizes)


def _native_words(kernel: str, x: Tensor, packed: PackedDelta) -> list[native.Words | None] | None:
    """What the native op takes of the factors; None where it does not run."""
    return native.words_of(packed) if kernel == NATIVE and native.readable(x) else None


@packed_op("low_rank_rows", "Tensor index", PACKED, "ScalarType dtype=float32")
def low_rank_rows(index: Tensor, packed: PackedDelta, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode rows `index` (int64, any shape, below m) of Û·V̂: [*index.shape, n] in `dtype`."""
    kernel = choose(index.device)
    if kernel == TRITON and (entry := table_of(packed, dtype, embedding=True)):
        table, slot = entry
        k, y = triton_kernels(), slot.new_zeros(*index.shape, packed.n, dtype=dtype)
        ends = torch.arange(2, dtype=torch.int32, device=slot.device)  # all rows use the one slot
        k.grouped_embed(y, index, table, k.Rows(slot, ends, slot))
        return y
    flat, points = index.reshape(-1), None
    if words := _native_words(kernel, index, packed):
        found = native.rows(flat, [(words[0], len(flat))])
        return found.to(dtype).view(*index.shape, packed.n)
    sides, group_size = packed_runs(packed.runs)["u"], packed.group_sizes[1]
    codes = bitpacking.unpack_columns(packed.u, sides, flat)
    v_groups, _ = scale_counts(packed.m, packed.n, packed.group_sizes)
    group = v_groups + (flat // group_size if group_size else torch.zeros_like(flat))
    scales = uniform.scales_from_bits(packed.ranks[:, 1:].contiguous())
    if packed.zeros is not None:
        points = zero_points(packed.zeros, packed.runs, scales.shape[1])[:, group]
    widths = row_bits(sides, codes)
    left = packed.quantizer.decode(codes, scales[:, group], points, widths, group_size=1)
    with torch.autocast(index.device.type, enabled=False):
        if index.device.type == "cpu" and lookup.supported(packed):
            found = lookup.times_right((left * scales[:, :1]).T, packed)
        else:
            found = lookup.row_by_row(left.T, packed.right())
    return found.to(dtype).reshape(*index.shape, packed.n)


@low_rank_rows.register_fake
def _(index, v, u, ranks, zeros, runs, m, n, group_sizes, dtype=torch.float32):
    return torch.empty(*index.shape, n, dtype=dtype, device=index.device)
