"""The DeltaMix error table (arXiv 2506.11087): what rank i costs at width b.

U of the SVD is orthonormal, so the layer-output error of rounding V splits into ranks,

    E[i, b] = sigma_i^2 * d C d^T,    d = v_i - v_hat_i(b)

with v_hat_i(b) rounded by GPTQ at width b. Width 0 drops the rank: d = v_i. GPTQ treats rows
independently, so all candidate widths are stacked as extra rows of ONE GPTQ call, and the rounded
rows are kept: the V_hat of the final allocation is picked from them without a second run.

GPTQ uses the damped C; the table measures the error with C itself, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..linalg.second_moments import Metric, damped, dense, energies
from . import gptq
from .quantizer import Quantizer
from .uniform import MIN_MAX

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Candidates:
    """Every rank rounded at every width: rows `[position of width * k + rank]` of `rounded`."""

    rounded: gptq.Rounded
    widths: tuple[int, ...]
    ranks: int


def error_table(
    right: torch.Tensor,
    sigma: torch.Tensor,
    gram: Metric,
    widths: Sequence[int],
    group_size: int,
    quantizer: Quantizer = MIN_MAX,
    damping: float = 0.01,
) -> tuple[torch.Tensor, Candidates]:
    """Error table float64 `[k, B]` and the rounded candidates.

    `right` V `[k, n]`, `sigma` `[k]`, `gram` C `[n, n]` or its diagonal `[n]`, undamped (None:
    identity), `widths` the B candidate widths, distinct, in 0..8. Raises ValueError for repeated
    widths or wrong shapes.
    """
    widths = tuple(int(width) for width in widths)
    if not widths or len(set(widths)) != len(widths):
        raise ValueError(f"widths must be distinct and not empty, got {widths}")
    ranks = len(right)
    if tuple(sigma.shape) != (ranks,):
        raise ValueError(f"sigma {list(sigma.shape)} does not match right {list(right.shape)}")
    bits = torch.tensor(widths, device=right.device).repeat_interleave(ranks)
    hessian = dense(damped(gram, damping))
    rounded = gptq.gptq_rows(right.repeat(len(widths), 1), hessian, bits, group_size, quantizer)
    power = sigma.to(torch.float64) ** 2
    table = torch.empty(ranks, len(widths), dtype=torch.float64, device=right.device)
    for start in range(0, ranks * len(widths), _BLOCK_ROWS):
        rows = torch.arange(
            start, min(start + _BLOCK_ROWS, ranks * len(widths)), device=right.device
        )
        error = right[rows % ranks].to(torch.float64) - rounded.rows(rows).dequantize()
        table[rows % ranks, rows // ranks] = energies(error, gram) * power[rows % ranks]
    return table, Candidates(rounded, widths, ranks)


def pick(candidates: Candidates, bits: torch.Tensor) -> gptq.Rounded:
    """The rounded factor whose rank i has width `bits[i]`.

    Raises ValueError if a width is not among the candidates.
    """
    if tuple(bits.shape) != (candidates.ranks,):
        raise ValueError(f"need {candidates.ranks} widths, got {list(bits.shape)}")
    device = candidates.rounded.codes.device
    position = torch.full((9,), -1, device=device)
    position[list(candidates.widths)] = torch.arange(len(candidates.widths), device=device)
    chosen = position[bits.to(device)]
    if bool((chosen < 0).any()):
        missing = sorted(set(bits.tolist()) - set(candidates.widths))
        raise ValueError(f"widths {missing} are not among the candidates {candidates.widths}")
    rows = chosen * candidates.ranks + torch.arange(candidates.ranks, device=device)
    return candidates.rounded.rows(rows)
