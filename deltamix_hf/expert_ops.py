"""What a mixture of experts computes with its 3-D weights, and the packed deltas' part of it.

Tokens are sorted by expert, so that every product is one grouped product over all experts: of the
frozen base weights by transformers' own, of the packed factors after decoding those of the experts
that some token chose. No step is taken once for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe

from .errors import DeltaMixError
from .packed_experts import PackedExperts, ranges

Project = Callable[[str, Tensor, Tensor], Tensor]
"""(name of a 3-D parameter, x [S, n] sorted by expert, ends int32 [experts]) -> [S, m].

Expert e has the rows ends[e − 1] to ends[e] of x.
"""

# Elements of decoded factors at a time, 64 MB in float32: 128 experts of Qwen3-30B-A3B at 1/16
# would take 420 MB for one parameter. A choice of 8 of them for a single token takes one step.
_AT_ONCE = 1 << 24
_ALIGNED = 16  # bytes between rows that torch's grouped product wants


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    project: Project,
) -> Tensor:
    """What `module` makes of tokens [T, h] and their experts [T, k], by way of `project`.

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
    """The frozen part of a projection: x [S, n] -> [S, m], with the bias the module has for it."""
    y = grouped_product(x, weight if module.is_transposed else weight.mT, ends)
    if not module.has_bias:
        return y
    rows = torch.arange(len(x), device=x.device)
    return y + getattr(module, f"{name}_bias")[torch.searchsorted(ends, rows, right=True)]


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e − 1] to ends[e] of x [S, n] times weights [E, n, m] of e; [S, m]."""
    wide = x.dtype == torch.float64 or any(
        size * x.element_size() % _ALIGNED for size in weights.shape[1:]
    )
    if wide:  # torch refuses these
        return torch.ops.transformers.grouped_mm_fallback(x.to(weights.dtype), weights, ends)
    return moe._grouped_mm(x, weights, ends)


def plain_expert_low_rank(
    x: Tensor,
    ends: Tensor,
    v: Tensor,
    u: Tensor,
    ranks: Tensor,
    counts: Tensor,
    zeros: Tensor | None,
    m: int,
    n: int,
    group_sizes: list[int],
    transposed: bool,
) -> Tensor:
    """x [S, n] -> [S, m] in x's dtype, each row by its expert; `transposed` maps m to n instead.

    Args:
        ends: int32 [experts], as `Project` has them.
        v, u, ranks, counts, zeros: see `packed_experts.py`.
    """
    packed = PackedExperts(m, n, (group_sizes[0], group_sizes[1]), v, u, ranks, counts, zeros)
    y = x.new_zeros(len(x), n if transposed else m)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    hit = ((sizes > 0) & (counts > 0)).nonzero()[:, 0]
    if not len(hit):
        return y
    # As elsewhere on a CPU: bfloat16 products of ever new weights would fill oneDNN's cache.
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    deepest = int(counts[hit].max())
    depth = -(-deepest // 8) * 8  # whole steps of 16 bytes
    with torch.autocast(x.device.type, enabled=False):
        for some in hit.split(max(1, _AT_ONCE // (depth * (m + n)))):
            factors, owner, place = packed.chosen(some)
            slots = owner * depth + place
            right, left = (
                side.new_zeros(len(some) * depth, side.shape[1], dtype=dtype)
                .index_copy_(0, slots, side.to(dtype))
                .view(len(some), depth, -1)
                for side in (factors.right(), factors.left())
            )
            if transposed:
                right, left = left, right
            rows = ranges(ends[some] - sizes[some], sizes[some])
            own = sizes[some].cumsum(0).to(torch.int32)
            h = grouped_product(x[rows].to(dtype), right.mT, own)
            y[rows] = grouped_product(h, left, own).to(x.dtype)
    return y


expert_low_rank = torch.library.custom_op("deltamix::expert_low_rank", mutates_args=())(
    plain_expert_low_rank
)


@expert_low_rank.register_fake
def _(x, ends, v, u, ranks, counts, zeros, m, n, group_sizes, transposed):
    return x.new_empty(len(x), n if transposed else m)


def _context(ctx, inputs, output):
    _, *tensors, m, n, group_sizes, transposed = inputs
    ctx.save_for_backward(*tensors)
    ctx.layout = (m, n, group_sizes, not transposed)


def _backward(ctx, grad):
    return (expert_low_rank(grad, *ctx.saved_tensors, *ctx.layout),) + (None,) * 10


expert_low_rank.register_autograd(_backward, setup_context=_context)


def delta_product(packed: PackedExperts, x: Tensor, ends: Tensor) -> Tensor:
    """The packed part of a projection: x [S, n] -> [S, m]."""
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling()
    op: Any = expert_low_rank if seen else plain_expert_low_rank
    return op(x, ends, *packed.op_arguments, False)
