"""GPTQ rounding (Frantar et al., arXiv 2210.17323) for factors whose ranks have their own widths.

For a weight row w and a layer Hessian H, GPTQ rounds one coordinate at a time and lets the
coordinates not yet rounded absorb the error. With H = R R^T, R upper triangular, and e = w - w_hat
the error is |e R|^2, and its i-th term needs the coordinates up to i alone, so

    w_hat_i  =  quant(w_i + sum_{j<i} e_j R_ji / R_ii)

in order. This is the paper's loop, which updates w by rows of the Cholesky factor of H^-1 (the
equivalence is Theorem 6 of QuIP, arXiv 2307.13304), but it needs no inverse: at 11008 coordinates
that saves a third of the time and 2 GB. Two uses share one sweep:

* `gptq_rows` for V `[r, c]`: each row has its own width, its groups run along the row. Columns are
  rounded in order of descending H_ii ("act-order", as Delta-CoMe does), on grids fitted to the row
  before the sweep ("static groups"), so groups stay runs of consecutive columns. Measured on
  SmolLM2-135M (q, up and down projections of layers 2, 15, 28; error in C relative to plain
  rounding, 2 / 3 / 4 bits, mean): grids fitted on entering a group 0.33 / 0.26 / 0.24, static grids
  0.28 / 0.25 / 0.24, static grids and act-order 0.21 / 0.19 / 0.19.
* `gptq_columns` for U `[m, k]`: column i is one rank with its own width, its groups run along the
  `m` rows, and its grid is fitted from the error-compensated column when the sweep reaches it. A
  0-bit column rounds to 0 and the other ranks absorb all of it. Ranks stay in the given order
  (descending sigma): six other orders were within 2 % of it or worse on the same matrices.

Unlike the textbook loop, which in exact arithmetic gives the same, it factorises in float64 the
Hessian scaled to unit diagonal (GPTQ is equivariant under column scaling, and the rank Hessians of
U carry 1/sigma^2 terms over many orders of magnitude). The weight is held transposed, so that the
coordinate being rounded is contiguous over all rows, and the sweep is left-looking: a block of
coordinates gets the errors of all earlier blocks in one matrix product, each of its coordinates
those of the block's earlier ones when it is reached.

A dead coordinate (zero Hessian diagonal: an input never seen in calibration) is rounded to nearest
on its own. GPTQ zeroes it; here that would erase the fine-tune's change for unseen inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg.cholesky import cholesky32
from . import uniform
from .quantizer import Quantizer, quantizer_of
from .uniform import MIN_MAX

# Steps per block. On one Zen 4 core 32, 64 and 128 are within 20 % of each other.
_BLOCK = 64


@dataclass(frozen=True)
class Rounded:
    """A quantized factor, rank-major.

    `codes` uint8 `[k, n]`, `scales` float32 `[k, G]` (exact in bfloat16), `zeros` uint8 `[k, G]`
    of the min-max grid or None for the Gaussian codebook, groups of `group_size` elements along n
    (0: one group), `bits` int64 `[k]`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    bits: Tensor

    def dequantize(self) -> Tensor:
        """Values float32 `[k, n]`."""
        quantizer = quantizer_of(self.zeros)
        return quantizer.decode(self.codes, self.scales, self.zeros, self.bits, self.group_size)

    def scaled(self, gains: Tensor) -> Rounded:
        """Row i times `gains[i]`, in bfloat16 scales; the codes stay."""
        return replace(self, scales=(self.scales * gains[:, None]).to(torch.bfloat16).float())

    def rows(self, index: Tensor) -> Rounded:
        """The rows picked by `index`: positions int64, or a mask bool `[k]`."""
        zeros = None if self.zeros is None else self.zeros[index]
        codes, scales, bits = self.codes[index], self.scales[index], self.bits[index]
        return replace(self, codes=codes, scales=scales, zeros=zeros, bits=bits)


def round_rows(
    weight: Tensor,
    bits: Tensor,
    group_size: int,
    quantizer: Quantizer = MIN_MAX,
    weights: Tensor | None = None,
) -> Rounded:
    """Round every element of `weight` `[r, c]` to the nearest value, row i at width `bits[i]`.

    `weights` `[c]`: what an error in each column costs, if scales can be fitted for it.
    """
    weight, bits = weight.float(), bits.to(weight.device)
    scales, zeros = quantizer.fit(weight, bits, group_size, weights)
    codes = quantizer.encode(weight, scales, zeros, bits, group_size)
    return Rounded(codes, scales, zeros, group_size, bits)


def gptq_rows(
    weight: Tensor,
    hessian: Tensor | None,
    bits: Tensor,
    group_size: int,
    quantizer: Quantizer = MIN_MAX,
    damping: float = 0.0,
) -> Rounded:
    """Round `weight` `[r, c]`, row i at width `bits[i]`, for least error in `hessian` `[c, c]`.

    `damping` times its mean diagonal is added to `hessian`; a diagonal `[c]` or None, the identity,
    leave plain rounding. Scales are fitted for the Hessian's diagonal. Raises ValueError for wrong
    shapes, values that are not finite, or a Hessian that stays indefinite after damping.
    """
    rows, columns = weight.shape
    _check(weight, hessian, bits, rows, columns)
    bits = bits.to(weight.device)
    if hessian is None or hessian.dim() == 1:
        return round_rows(weight, bits, group_size, quantizer, hessian)
    scales, zeros = quantizer.fit(weight.float(), bits, group_size, hessian.diagonal())
    round_values = quantizer.rounder(bits)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).to(weight.device)
    group = (order // group_size if group_size else torch.zeros_like(order)).tolist()
    work = weight.t()[order].float()  # [c, r]
    step_scales = scales.t().contiguous()  # [G, r]
    step_zeros = None if zeros is None else zeros.t().float().contiguous()
    codes = torch.empty_like(work, dtype=torch.uint8)

    def round_step(i: int, values: Tensor) -> Tensor:
        zero = None if step_zeros is None else step_zeros[group[i]]
        return round_values(values, step_scales[group[i]], zero, codes[i])

    _sweep(work, hessian.to(weight.device), round_step, order, damping)
    ordered = torch.empty_like(codes)
    ordered[order] = codes
    return Rounded(ordered.t().contiguous(), scales, zeros, group_size, bits)


def gptq_columns(weight: Tensor, hessian: Tensor, bits: Tensor, group_size: int) -> Rounded:
    """Round `weight` `[m, k]`, column i at width `bits[i]`, with `hessian` `[k, k]` over columns.

    Same conventions as `gptq_rows`, but the result is rank-major: codes `[k, m]` and
    `dequantize()` is the transposed factor. Min-max grids only: the published methods need it.
    """
    m, ranks = weight.shape
    _check(weight, hessian, bits, ranks, ranks)
    bits = bits.to(weight.device)
    groups = uniform.group_count(m, group_size)
    width = group_size or m
    # Padded elements are 0, round to 0 and have no error, so they stay 0 through the sweep.
    work = weight.new_zeros(ranks, groups * width, dtype=torch.float32)
    work[:, :m] = weight.t()
    top = uniform.top_code(bits)
    codes = work.new_empty(ranks, groups, width, dtype=torch.uint8)
    scales = work.new_empty(ranks, groups)
    zeros = work.new_empty(ranks, groups, dtype=torch.uint8)

    def round_step(i: int, values: Tensor) -> Tensor:
        grouped = values.view(groups, width)
        low, high = torch.aminmax(grouped, dim=1)
        scales[i], zeros[i] = uniform.fit_range(low, high, top[i].expand(groups))
        zero = zeros[i].to(torch.float32)
        scale = scales[i, :, None]
        return uniform.round_values(grouped, scale, zero[:, None], codes[i], top[i]).view(-1)

    _sweep(work, hessian.to(work.device), round_step, torch.arange(ranks, device=work.device))
    return Rounded(codes.view(ranks, -1)[:, :m].contiguous(), scales, zeros, group_size, bits)


def _sweep(
    work: Tensor,
    hessian: Tensor,
    round_step: Callable[[int, Tensor], Tensor],
    order: Tensor,
    damping: float = 0.0,
) -> None:
    """Round rows `[l]` of `work` by `round_step(i, row)`: coordinates `order[i]` of the Hessian."""
    mixing = cholesky32(hessian, damping, order.flip(0))  # R, rows and columns reversed
    mixing.div_(mixing.diagonal().clone())
    mixing = mixing.t().flip(0, 1)  # (i, j): R_ji / R_ii, what the error of step j adds to step i
    errors = torch.empty_like(work)
    for start in range(0, len(work), _BLOCK):
        stop = min(start + _BLOCK, len(work))
        block = torch.addmm(work[start:stop], mixing[start:stop, :start], errors[:start])
        for i in range(start, stop):
            values = block[i - start]
            if i > start:
                values = torch.addmv(values, errors[start:i].t(), mixing[i, start:i])
            torch.sub(work[i], round_step(i, values), out=errors[i])


def _check(weight: Tensor, hessian: Tensor | None, bits: Tensor, ranks: int, steps: int) -> None:
    """Raise a ValueError for wrong shapes or values that are not finite."""
    if tuple(bits.shape) != (ranks,):
        raise ValueError(f"need one width for each of {ranks} ranks, got {list(bits.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight to round holds NaN or infinity")
    if hessian is None:
        return
    if tuple(hessian.shape) not in ((steps, steps), (steps,)):
        shape = list(hessian.shape)
        raise ValueError(f"hessian must be [{steps}, {steps}] or [{steps}], got {shape}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinity")
