"""What a mixture of experts computes with its 3-D weights, and the packed deltas' part of it.

Tokens are sorted by expert. Of the frozen base weights a projection is then one grouped product,
transformers' own. The packed factors run through the grouped kernels of many deltas, an expert a
slot: they find each row's factors on the device, and nothing waits for the CPU. Where those cannot
run, only the factors of experts that some token chose are decoded, together for all that have few
tokens: while generating, that is one step for all of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaMixError
from ..quantization import uniform
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import packed_runs
from ..transformers_private import moe
from . import lookup, native
from .dispatch import NATIVE, TRITON, choose, table_of, triton_kernels
from .packed_op import EXPERTS, cheapest, packed_op

Project = Callable[[str, Tensor, Tensor], Tensor]
"""(name of a 3-D parameter, x [S, n] sorted by expert, ends int32 [experts]) -> [S, m].

Expert e has the rows ends[e − 1] to ends[e] of x.
"""

_ALIGNED = 16  # bytes between rows that torch's grouped product wants


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, project: Project
) -> Tensor:
    """Run `module` on tokens [T, h] and their experts [T, k], by way of `project`: [T, h].

    The steps are those of transformers' `grouped_mm_experts_forward`.

    Raises:
        DeltaMixError: the experts are spread over several devices.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise DeltaMixError(
            "experts with a packed delta cannot be spread over devices; load without an expert plan"
        )
    tokens, top_k = top_k_index.shape
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(module.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    y = project(first, hidden_states[order // top_k], ends)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = project("down_proj", y, ends)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order][:, None]
    return y[order.argsort()].view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def base_product(module: Any, name: str, weight: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Multiply x [S, n] by the frozen weights, with the module's bias if it has one: [S, m]."""
    y = grouped_product(x, weight if module.is_transposed else weight.mT, ends)
    if not module.has_bias:
        return y
    rows = torch.arange(len(x), device=x.device)
    return y + getattr(module, f"{name}_bias")[torch.searchsorted(ends, rows, right=True)]


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows ends[e − 1] to ends[e] of x [S, n] by weights [E, n, m] of e: [S, m]."""
    wide = x.dtype == torch.float64 or any(
        size * x.element_size() % _ALIGNED for size in weights.shape[1:]
    )
    if wide:  # torch refuses these
        return torch.ops.transformers.grouped_mm_fallback(x.to(weights.dtype), weights, ends)
    return moe._grouped_mm(x, weights, ends)


_ARGUMENTS = "Tensor x", "Tensor ends", EXPERTS, "bool transposed", "SymInt masked_rows=16"


@packed_op("expert_low_rank", *_ARGUMENTS)
def expert_low_rank(
    x: Tensor, ends: Tensor, packed: PackedDelta, transposed: bool, masked_rows: int = 16
) -> Tensor:
    """Multiply each row of x [S, n] by its expert: [S, m] in x's dtype; `transposed`: m to n.

    Args:
        masked_rows: multiply up to this many rows by the ranks of all their experts, then mask;
            more take no longer when each expert is decoded for itself.
        ends: int32 [experts], as `Project` has them.
    """
    assert packed.counts is not None
    sizes = ends.diff(prepend=ends.new_zeros(1))
    if x.dtype != torch.float64 and choose(x.device) == NATIVE and native.readable(x):
        words = native.words_of(packed)
        if words is not None:
            return native.products(x, list(zip(words, sizes.tolist(), strict=True)), transposed)
    y = x.new_zeros(len(x), packed.n if transposed else packed.m)
    hit = ((sizes > 0) & (packed.counts > 0)).nonzero()[:, 0]
    experts = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    rows, starts = sizes[hit].tolist(), (ends - sizes)[hit].tolist()
    with torch.autocast(x.device.type, enabled=False):
        for some in _groups(rows, masked_rows):
            part = slice(starts[some.start], starts[some.stop - 1] + rows[some.stop - 1])
            factors, owner = packed.chosen(hit[some])
            right, left, scales = _decoded(factors, x.dtype)
            if transposed:
                right, left = left, right
            h = (x[part].to(right.dtype) @ right.T).mul_(scales)
            h.masked_fill_(experts[part, None] != hit[some][owner], 0)
            y[part] = (h @ left).to(x.dtype)
    return y


def _groups(rows: list[int], most: int) -> Iterator[slice]:
    """Neighbours that together have at most `most` rows, or one with more."""
    start = total = 0
    for i, count in enumerate(rows):
        if i > start and total + count > most:
            yield slice(start, i)
            start, total = i, 0
        total += count
    if rows:
        yield slice(start, len(rows))


def _decoded(factors: PackedDelta, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """V̂ [K, n], Ûᵀ [K, m] and what each rank is yet to be multiplied by, [K]; see `lookup.py`."""
    quick = factors.v.device.type == "cpu" and dtype != torch.float64
    if quick and factors.group_sizes == (0, 0) and lookup.supported(factors):
        sides = packed_runs(factors.runs)
        right = lookup.levels(factors.v, sides["v"], factors.n)
        left = lookup.levels(factors.u, sides["u"], factors.m)
        return right, left, uniform.scales_from_bits(factors.ranks[:, 1:].contiguous()).prod(1)
    dtype = torch.float32 if quick else dtype  # as elsewhere on a CPU
    right, left = factors.right().to(dtype), factors.left().to(dtype)
    return right, left, right.new_ones(len(right))


@expert_low_rank.register_fake
def _(x, ends, v, u, ranks, zeros, counts, m, n, group_sizes, transposed, masked_rows=16):
    return x.new_empty(len(x), n if transposed else m)


def _context(ctx, inputs, output):
    _, *tensors, m, n, group_sizes, transposed, masked_rows = inputs
    ctx.save_for_backward(*tensors)
    ctx.layout = (m, n, group_sizes, not transposed, masked_rows)


def _backward(ctx, grad):
    return (expert_low_rank(grad, *ctx.saved_tensors, *ctx.layout),) + (None,) * 11


expert_low_rank.register_autograd(_backward, setup_context=_context)


def add_delta(y: Tensor, packed: PackedDelta, x: Tensor, ends: Tensor) -> Tensor:
    """Add the packed part to y [S, m], a frozen projection of x [S, n]; may change y."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y + cheapest(expert_low_rank, x.to(y.dtype), ends, packed, False)
    if not add_by_kernels(y, packed, x, ends):
        y += expert_low_rank.plain(x.to(y.dtype), ends, packed, False)
    return y


def add_by_kernels(y: Tensor, packed: PackedDelta, x: Tensor, ends: Tensor) -> bool:
    """Add x [S, n] times the experts' factors to y [S, m] in place; False: nothing was done.

    Rows and `ends` as for `Project`. Not for min-max grids, gradients or autocast.
    """
    unknown = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    fits = packed.zeros is None and y.dtype == x.dtype and not unknown
    found = table_of(packed, x.dtype) if fits and choose(x.device) == TRITON else None
    if found is None:
        return False
    table, slots = found
    numbers = torch.arange(len(x), dtype=torch.int32, device=x.device)
    k = triton_kernels()
    rows = k.Rows(numbers, torch.cat([ends.new_zeros(1), ends]), slots)
    k.grouped_add(y, x, table, rows)
    return True
