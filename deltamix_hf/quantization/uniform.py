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

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounds values, given scales and zero points (all float32 `[k]`), writes codes uint8 `[k]`.
Rounder = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def group_count(n: int, group_size: int) -> int:
    """Groups in a vector of `n` elements; raises ValueError for a negative `group_size`."""
    if group_size < 0:
        raise ValueError(f"group_size must be >= 0, got {group_size}")
    return -(-n // group_size) if group_size else 1


def check_groups(codes: Tensor, group_size: int, *parts: Tensor) -> None:
    """Raise a ValueError unless scales and zero points of `codes` `[k, n]` are `[k, G]`."""
    expected = [len(codes), group_count(codes.shape[1], group_size)]
    found = [list(part.shape) for part in parts]
    if any(shape != expected for shape in found):
        needed = " and ".join(["scales", "zeros"][: len(parts)])
        raise ValueError(
            f"codes {list(codes.shape)} at group size {group_size} need {needed} {expected}, "
            f"got {' and '.join(map(str, found))}"
        )


def top_code(bits: Tensor) -> Tensor:
    """Largest code of each width, `2**b - 1`, float32; raises ValueError outside 0..8."""
    if bits.numel() and not (int(bits.min()) >= 0 and int(bits.max()) <= 8):
        raise ValueError(f"widths must lie in 0..8, got {int(bits.min())}..{int(bits.max())}")
    return torch.exp2(bits.to(torch.float32)) - 1


def fit_range(low: Tensor, high: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Grid from the smallest and largest element of each group `[...]` and `top_code(bits)`.

    Returns `scale` float32 `[...]`, exactly representable in bfloat16, and `zero` uint8 `[...]`.
    """
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    scale = ((high - low) / top.clamp(min=1)).to(torch.bfloat16).float()
    scale = torch.where((scale > 0) & (top > 0), scale, 1.0)
    zero = torch.clamp(torch.round(-low / scale), torch.zeros_like(top), top)
    return scale, zero.to(torch.uint8)


def round_values(
    values: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, top: Tensor
) -> Tensor:
    """Round `values` float32 to a grid of `top + 1` codes, which are written to `codes` uint8."""
    assert zero is not None
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
    """int16 bit patterns of the nearest bfloat16; exact for fitted scales."""
    return scales.to(torch.bfloat16).view(torch.int16)


def scales_from_bits(bits: Tensor) -> Tensor:
    """float32 scales from the int16 bit patterns of bfloat16; ValueError for another dtype."""
    if bits.dtype != torch.int16:
        raise ValueError(f"scale bit patterns must be int16, got {bits.dtype}")
    return bits.view(torch.bfloat16).to(torch.float32)


class MinMax:
    """The quantizer of `codebook="min-max"`; `quantizer.py` describes its methods."""

    name = "min-max"
    zero_points = True
    # Of a standard normal variable, in groups of 128.
    distortion = (1.0, 0.979, 0.2533, 0.0466, 0.01014, 0.002376, 5.75e-4, 1.42e-4, 3.53e-5)

    def fit(
        self, x: Tensor, bits: Tensor, group_size: int, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the range of every group: a grid has no choice that `weights` could change."""
        groups = _grouped(x, group_size)
        return fit_range(groups.amin(-1), groups.amax(-1), top_code(bits[:, None]))

    def encode(
        self, x: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Round to the nearest code, uint8 `[k, n]`."""
        assert zeros is not None
        groups, top = _grouped(x, group_size), top_code(bits)[:, None, None]
        codes = torch.empty_like(groups, dtype=torch.uint8)
        round_values(groups, scales[..., None], zeros[..., None], codes, top)
        return codes.flatten(1)[:, : x.shape[1]].contiguous()

    def decode(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Compute `(code - zero) * scale`, float32 `[k, n]`; ValueError as `check_groups`."""
        assert zeros is not None
        check_groups(codes, group_size, scales, zeros)
        values = _grouped(codes, group_size).to(torch.float32)
        values.sub_(zeros[..., None].float()).mul_(scales[..., None])
        return values.flatten(1)[:, : codes.shape[1]].contiguous()

    def rounder(self, bits: Tensor) -> Rounder:
        """Round to the grid `scale`, `zero`; its largest code is computed once."""
        return partial(round_values, top=top_code(bits))


MIN_MAX = MinMax()
