"""The DeltaMix error table (arXiv 2506.11087): what rank i costs at width b.

U of the SVD is orthonormal, so the layer-output error of rounding V splits into ranks,

    E[i, b] = sigma_i^2 * d C d^T,    d = v_i - v_hat_i(b)

with v_hat_i(b) rounded by GPTQ at width b. Width 0 drops the rank: d = v_i. GPTQ treats rows
independently, so all candidate widths are stacked as extra rows of ONE GPTQ call, and the rounded
rows are kept: the V_hat of the final allocation is picked from them without a second run.

GPTQ uses the damped C; the table measures the error with C itself, in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.second_moments import Metric, damped, dense, energies
from ..linalg.whitened_svd import Factors
from .gptq import Rounded, gptq_rows
from .quantizer import Quantizer

_BLOCK_ROWS = 4096
_DAMPING = 0.01


def error_table(
    factors: Factors, gram: Metric, widths: Sequence[int], group_size: int, quantizer: Quantizer
) -> tuple[Tensor, Rounded]:
    """Error table float64 `[k, B]` and all candidates, rank i at width b being row `b * k + i`.

    Of `factors` only V and sigma count; `gram` is C `[n, n]` or its diagonal `[n]`, undamped (None:
    identity), `widths` the B candidate widths, distinct, in 0..8 (as `Method` keeps them).
    """
    right, ranks = factors.right, len(factors.right)
    bits = torch.tensor(widths, device=right.device).repeat_interleave(ranks)
    hessian = dense(damped(gram, _DAMPING))
    rounded = gptq_rows(right.repeat(len(widths), 1), hessian, bits, group_size, quantizer)
    power = factors.sigma.to(torch.float64) ** 2
    table = torch.empty(ranks, len(widths), dtype=torch.float64, device=right.device)
    for rows in torch.arange(table.numel(), device=right.device).split(_BLOCK_ROWS):
        error = right[rows % ranks].to(torch.float64) - rounded.rows(rows).dequantize()
        # C of few tokens has directions of energy 0, which rounding can make negative.
        found = energies(error, gram).clamp(min=0)
        table[rows % ranks, rows // ranks] = found * power[rows % ranks]
    return table, rounded


def pick(table: Tensor, rounded: Rounded, choice: Tensor) -> Rounded:
    """Pick width number `choice[i]`, int64 `[k]`, of each rank; ValueError for another k."""
    if tuple(choice.shape) != (len(table),):
        raise ValueError(f"need a choice for each of {len(table)} ranks, got {list(choice.shape)}")
    rows = torch.arange(table.numel(), device=table.device).view(table.T.shape)
    return rounded.rows(rows.gather(0, choice.to(table.device)[None])[0])
