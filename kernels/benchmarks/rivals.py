"""What our kernels are timed against. A rival makes the products of layers that read one input.

`lora`: the factors in bf16, as LoRA adapters run without kernels of their own. `vllm_lora`: the
same by vLLM's Triton kernels. `merged`: the delta added to the weights, one model a delta.
`one_bit`: a dense sign matrix and one scale, as BitDelta stores a delta, with a Triton product
written here. `gemlite`: a published low-bit kernel on a dense 2-bit delta. vLLM's and gemlite's
raise ImportError where their package is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Run = Callable[[Tensor], list[Tensor]]  # x [rows, n] -> [rows, m] of each layer
Weights = Sequence[Tensor]  # [m, n] of each layer
Biases = Sequence[Tensor | None]


def base(weights: Weights, biases: Biases) -> Run:
    return lambda x: [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def merged(weights: Weights, biases: Biases, deltas: Sequence[Tensor]) -> Run:
    return base([w + d.to(w.dtype) for w, d in zip(weights, deltas, strict=True)], biases)


def lora(
    weights: Weights, biases: Biases, rights: Sequence[Tensor], lefts: Sequence[Tensor]
) -> Run:
    """Factors [k, n] and [k, m] of each layer: one product for all of the former, then one each."""
    own, right, ranks = base(weights, biases), torch.cat([*rights]), [len(r) for r in rights]

    def run(x: Tensor) -> list[Tensor]:
        parts = F.linear(x, right).split(ranks, 1)
        return [y.addmm_(h, left) for y, h, left in zip(own(x), parts, lefts, strict=True)]

    return run


def vllm_lora(
    weights: Weights, biases: Biases, rights: Sequence[Tensor], lefts: Sequence[Tensor], rows: int
) -> Run:
    """As vLLM 0.32 runs one adapter: joined base weights, equal ranks, two launches for all."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    device, lengths = weights[0].device, [len(w) for w in weights]
    weight, rank = torch.cat([*weights]), max(map(len, rights))
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    rights, lefts = ([F.pad(t, (0, 0, 0, rank - len(t))) for t in side] for side in (rights, lefts))
    a = [t[None].contiguous() for t in rights]
    b = [t.T[None].contiguous() for t in lefts]
    meta = LoRAKernelMeta.make(max_loras=1, max_num_tokens=rows, device=device)
    meta.prepare_tensors(torch.zeros(rows, dtype=torch.int32, device=device))
    of_rows = meta.meta_args(rows, False)

    def run(x: Tensor) -> list[Tensor]:
        y = F.linear(x, weight, bias)
        h = torch.zeros(len(a), len(x), rank, dtype=torch.float32, device=device)
        lora_shrink(x, a, h, *of_rows, 1.0)
        lora_expand(h, b, y, *of_rows, offset_start=0, add_inputs=True)
        return [*y.split(lengths, 1)]

    return run


@triton.jit
def _one_bit_kernel(
    x, signs, y, rows, n, m, scale, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """y += scale·x·Sᵀ, S = ±1 [m, n]; bit j of byte [m, c] is the sign of element 8c + j."""
    output = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.arange(0, M)
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, n, K):
        k = start + tl.arange(0, K)
        at = signs + output.to(tl.int64)[None, :] * (n // 8) + (k // 8)[:, None]
        bits = tl.load(at, mask=(output < m)[None, :] & (k < n)[:, None], other=0).to(tl.int32)
        sign = (((bits >> (k % 8)[:, None]) & 1) * 2 - 1).to(x.dtype.element_ty)
        part = tl.load(
            x + row[:, None] * n + k[None, :],
            mask=(row < rows)[:, None] & (k < n)[None, :],
            other=0.0,
        )
        sums = tl.dot(part, sign, sums)
    at = y + row.to(tl.int64)[:, None] * m + output[None, :]
    live = (row < rows)[:, None] & (output < m)[None, :]
    old = tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, (old + scale * sums).to(y.dtype.element_ty), mask=live)


class OneBit:
    """A 1-bit dense delta: sign(ΔW)·scale, n a multiple of 8."""

    def __init__(self, delta: Tensor):
        self.scale = float(delta.abs().mean())
        m, n = delta.shape
        powers = 2 ** torch.arange(8, device=delta.device)
        positive = (delta > 0).view(m, n // 8, 8)
        self.signs = (positive * powers).sum(-1).to(torch.uint8)

    def dense(self) -> Tensor:
        m, columns = self.signs.shape
        bits = (self.signs[:, :, None] >> torch.arange(8, device=self.signs.device)) & 1
        return self.scale * (2.0 * bits.view(m, 8 * columns) - 1)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        (rows, n), m = x.shape, y.shape[1]
        for start in range(0, rows, 64):
            part = x[start : start + 64]
            block = max(16, triton.next_power_of_2(len(part)))
            _one_bit_kernel[(triton.cdiv(m, 64),)](
                part, self.signs, y[start:], len(part), n, m, self.scale, M=block, N=64, K=128
            )
        return y


def one_bit(weights: Weights, biases: Biases, signs: Sequence[OneBit]) -> Run:
    own = base(weights, biases)
    return lambda x: [sign.add(y, x) for sign, y in zip(signs, own(x), strict=True)]


def gemlite(weights: Weights, biases: Biases, deltas: Sequence[Tensor]) -> Run:
    """Deltas in 2 bits, groups of 128."""
    own, made = base(weights, biases), [_gemlite_linear(d.to(weights[0].dtype)) for d in deltas]
    return lambda x: [y.add_(product(x)) for y, product in zip(own(x), made, strict=True)]


def _gemlite_linear(delta: Tensor) -> Callable[[Tensor], Tensor]:
    from gemlite.core import DType, GemLiteLinearTriton

    m, n = delta.shape
    groups = delta.float().view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 3
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 3).to(torch.uint8).view(m, n)
    layer = GemLiteLinearTriton(
        2,
        group_size=128,
        in_features=n,
        out_features=m,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes, scale.view(m, -1).to(delta.dtype), zero.view(m, -1).to(delta.dtype), None)
    return layer
