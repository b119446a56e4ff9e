"""Asymmetric uniform min-max quantization in groups, as used by GPTQ and Delta-CoMe.

A vector is cut into groups of `group_size` consecutive elements (the last may be shorter;
`group_size` 0 means one group for the whole vector). For a group x at b >= 1 bits:

    lo = min(x, 0),  hi = max(x, 0)
    scale = bf16((hi - lo) / (2**b - 1))         rounded to the nearest bfloat16, then used in fp32
    zero  = clamp(round(-lo / scale), 0, 2**b - 1)
    code  = clamp(round(x / scale) + zero, 0, 2**b - 1)
    x_hat = (code - zero) * scale

The range always contains 0, so 0 is exact. The scale is rounded BEFORE codes are computed: the
stored bfloat16 is then the scale the codes were chosen for, and storage adds no error of its own.

Two special cases keep every formula free of NaN without a branch. A group of zeros gets scale 1
and zero 0: its codes are 0 and decode to exactly 0, and no division by a zero scale can occur when
GPTQ later quantizes other values with the same grid. A 0-bit row also gets scale 1, zero 0 and
code 0, so it decodes to 0 like any other row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean squared error of each width 0..8 on a standard normal variable, in groups of 128.
DISTORTION = (1.0, 0.979, 0.2533, 0.0466, 0.01014, 0.002376, 5.75e-4, 1.42e-4, 3.53e-5)


def group_count(n: int, group_size: int) -> int:
    """Groups in a vector of `n` elements; `group_size` 0 means one group."""
    if group_size < 0:
        raise ValueError(f"group_size must be >= 0, got {group_size}")
    return 1 if group_size == 0 else max(1, -(-n // group_size))


def top_code(bits: Tensor) -> Tensor:
    """Largest code of each width, `2**b - 1`, float32; raises ValueError outside 0..8."""
    if bits.numel() and not (int(bits.min()) >= 0 and int(bits.max()) <= 8):
        raise ValueError(f"widths must lie in 0..8, got {int(bits.min())}..{int(bits.max())}")
    return torch.exp2(bits.to(torch.float32)) - 1


def fit(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Grid of the groups `x` `[..., g]` at widths `bits` (broadcast to `x.shape[:-1]`).

    Returns `scale` float32 `[...]`, exactly representable in bfloat16, and `zero` uint8 `[...]`.
    """
    return fit_range(x.amin(-1), x.amax(-1), top_code(bits))


def fit_range(low: Tensor, high: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """`fit` from the smallest and largest element of each group and `top_code(bits)`."""
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    scale = ((high - low) / top.clamp(min=1)).to(torch.bfloat16).float()
    scale = torch.where((scale > 0) & (top > 0), scale, 1.0)
    zero = torch.clamp(torch.round(-low / scale), torch.zeros_like(top), top)
    return scale, zero.to(torch.uint8)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor) -> Tensor:
    """Codes uint8 `[..., g]` of `x` `[..., g]` on the grid `scale`, `zero` `[...]`."""
    top = top_code(bits)[..., None]
    code = torch.round(x / scale[..., None]) + zero[..., None]
    return torch.clamp(code, torch.zeros_like(top), top).to(torch.uint8)


def round_values(values: Tensor, scale: Tensor, zero: Tensor, top: Tensor, codes: Tensor) -> Tensor:
    """Round `values` float32 to a grid of `top + 1` codes, which are written to `codes` uint8."""
    code = (values / scale).round_().add_(zero).clamp_(min=0)
    torch.minimum(code, top, out=code)
    codes.copy_(code)
    return code.sub_(zero).mul_(scale)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """`[k, G, g]`, the last group filled with 0, which changes no grid: every range contains 0."""
    k, n = x.shape
    groups, width = group_count(n, group_size), group_size or n
    return F.pad(x, (0, groups * width - n)).view(k, groups, width)


def scales_to_bits(scales: Tensor) -> Tensor:
    """int16 bit patterns of the nearest bfloat16; exact for scales made by `fit`."""
    return scales.to(torch.bfloat16).view(torch.int16)


def scales_from_bits(bits: Tensor) -> Tensor:
    """float32 scales from the int16 bit patterns of bfloat16."""
    if bits.dtype != torch.int16:
        raise ValueError(f"scale bit patterns must be int16, got {bits.dtype}")
    return bits.view(torch.bfloat16).to(torch.float32)


class MinMax:
    """The quantizer of `codebook="min-max"`; see `quantizer.Quantizer`."""

    name = "min-max"
    zero_points = True
    distortion: tuple[float, ...] = DISTORTION

    def fit(
        self, x: Tensor, bits: Tensor, group_size: int, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the range of every group: a grid has no choice that `weights` could change."""
        return fit(_grouped(x, group_size), bits[:, None])

    def encode(
        self, x: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Round to the nearest code, uint8 `[k, n]`."""
        assert zeros is not None
        codes = quantize(_grouped(x, group_size), scales, zeros, bits[:, None])
        return codes.flatten(1)[:, : x.shape[1]].contiguous()

    def decode(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Compute `(code - zero) * scale`, float32 `[k, n]`.

        Raises:
            ValueError: scales or zero points are not `[k, G]`.
        """
        assert zeros is not None
        k, n = codes.shape
        groups = group_count(n, group_size)
        if tuple(scales.shape) != (k, groups) or tuple(zeros.shape) != (k, groups):
            raise ValueError(
                f"codes {list(codes.shape)} at group size {group_size} need scales and zeros "
                f"[{k}, {groups}], got {list(scales.shape)} and {list(zeros.shape)}"
            )
        values = codes.to(torch.float32)
        scales, zeros = scales.to(torch.float32), zeros.to(torch.float32)
        if groups == 1:
            return values.sub_(zeros).mul_(scales)
        whole = n // group_size
        body = values[:, : whole * group_size].unflatten(1, (whole, group_size))
        body.sub_(zeros[:, :whole, None]).mul_(scales[:, :whole, None])
        if whole < groups:
            values[:, whole * group_size :].sub_(zeros[:, whole:]).mul_(scales[:, whole:])
        return values

    def rounder(self, bits: Tensor) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]:
        """Round to the grid `scale`, `zero`; its largest code is computed once."""
        top = top_code(bits)

        def rounded(values: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor) -> Tensor:
            assert zero is not None
            return round_values(values, scale, zero, top, codes)

        return rounded


MIN_MAX = MinMax()
