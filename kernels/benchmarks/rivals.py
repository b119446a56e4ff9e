"""What our kernels are timed against, besides the base product and our own reference.

`lora`: the factors as dense bf16 matrices and two products, as LoRA adapters run. `OneBit`: a dense
sign matrix and one scale, as BitDelta stores a delta, with a Triton product written here.
`gemlite_linear`: a published low-bit kernel on a dense 2-bit delta, if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def lora(x: Tensor, weight: Tensor, bias: Tensor | None, right: Tensor, left: Tensor) -> Tensor:
    """x·Wᵀ + (x·rightᵀ)·left with right [k, n] and left [k, m] in x's dtype."""
    return F.linear(x, weight, bias) + F.linear(x, right) @ left


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

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        rows, n = x.shape
        m = len(weight)
        for start in range(0, rows, 64):
            part = x[start : start + 64]
            block = max(16, triton.next_power_of_2(len(part)))
            _one_bit_kernel[(triton.cdiv(m, 64),)](
                part, self.signs, y[start:], len(part), n, m, self.scale, M=block, N=64, K=128
            )
        return y


def gemlite_linear(delta: Tensor) -> Callable[[Tensor], Tensor] | None:
    """x -> x·ΔWᵀ with ΔW in 2 bits, groups of 128, by gemlite; None if it is not installed."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError:
        return None
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
