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

import torch
import torch.nn.functional as F


def group_count(n: int, group_size: int) -> int:
    """Groups in a vector of `n` elements; `group_size` 0 means one group."""
    if group_size < 0:
        raise ValueError(f"group_size must be >= 0, got {group_size}")
    return 1 if group_size == 0 else max(1, -(-n // group_size))


def top_code(bits: torch.Tensor) -> torch.Tensor:
    """Largest code of each width, `2**b - 1`, float32; raises ValueError outside 0..8."""
    if bits.numel() and not (int(bits.min()) >= 0 and int(bits.max()) <= 8):
        raise ValueError(f"widths must lie in 0..8, got {int(bits.min())}..{int(bits.max())}")
    return torch.exp2(bits.to(torch.float32)) - 1


def fit(x: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid of the groups `x` `[..., g]` at widths `bits` (broadcast to `x.shape[:-1]`).

    Returns `scale` float32 `[...]`, exactly representable in bfloat16, and `zero` uint8 `[...]`.
    """
    return fit_range(x.amin(-1), x.amax(-1), top_code(bits))


def fit_range(
    low: torch.Tensor, high: torch.Tensor, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit` from the smallest and largest element of each group and `top_code(bits)`."""
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    scale = ((high - low) / top.clamp(min=1)).to(torch.bfloat16).float()
    scale = torch.where((scale > 0) & (top > 0), scale, 1.0)
    zero = torch.clamp(torch.round(-low / scale), torch.zeros_like(top), top)
    return scale, zero.to(torch.uint8)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: torch.Tensor
) -> torch.Tensor:
    """Codes uint8 `[..., g]` of `x` `[..., g]` on the grid `scale`, `zero` `[...]`."""
    top = top_code(bits)[..., None]
    code = torch.round(x / scale[..., None]) + zero[..., None]
    return torch.clamp(code, torch.zeros_like(top), top).to(torch.uint8)


def fit_rows(
    x: torch.Tensor, bits: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit` of every group of the rows of `x` `[k, n]`, row i at width `bits[i]`.

    Returns scales float32 `[k, G]` and zeros uint8 `[k, G]`.
    """
    return fit(_grouped(x, group_size), bits[:, None])


def round_to_nearest(
    x: torch.Tensor, bits: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit and quantize the rows of `x` `[k, n]`, row i at width `bits[i]`.

    Returns codes uint8 `[k, n]`, scales float32 `[k, G]` and zeros uint8 `[k, G]`.
    """
    grouped = _grouped(x, group_size)
    scales, zeros = fit(grouped, bits[:, None])
    codes = quantize(grouped, scales, zeros, bits[:, None])
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), scales, zeros


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[k, G, g]`, the last group filled with 0, which changes no grid: every range contains 0."""
    k, n = x.shape
    groups, width = group_count(n, group_size), group_size or n
    return F.pad(x, (0, groups * width - n)).view(k, groups, width)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int
) -> torch.Tensor:
    """`(code - zero) * scale` float32 `[k, n]`.

    `codes` uint8 `[k, n]`, `scales` float32 `[k, G]`, `zeros` uint8 `[k, G]`. Raises ValueError if
    G is not the number of groups of n elements.
    """
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


def scales_to_bits(scales: torch.Tensor) -> torch.Tensor:
    """int16 bit patterns of the nearest bfloat16; exact for scales made by `fit`."""
    return scales.to(torch.bfloat16).view(torch.int16)


def scales_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 scales from the int16 bit patterns of bfloat16."""
    if bits.dtype != torch.int16:
        raise ValueError(f"scale bit patterns must be int16, got {bits.dtype}")
    return bits.view(torch.bfloat16).to(torch.float32)
