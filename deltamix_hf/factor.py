"""The delta as ranks in order of what they are worth: SVD in the metric of the layer.

With A on outputs and C on inputs, tr((ΔW−D)ᵀ·A·(ΔW−D)·C) over all D of rank k is least for

    P·S·Qᵀ = SVD(L_Aᵀ·ΔW·L_C),    left = L_A⁻ᵀ·P  [m, k],    right = Qᵀ·L_C⁻¹  [k, n]

with L·Lᵀ the metrics: ΔW ≈ left·diag(S)·right, columns of `left` orthonormal in A, rows of `right`
orthonormal in C, and S² is what each rank's absence costs. Identity metrics give the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .metric import Metric, root, unwhiten, whiten
from .svd import thin_svd


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ left·diag(sigma)·right: `[m, k]`, descending positive `[k]`, `[k, n]`, float32."""

    left: Tensor
    sigma: Tensor
    right: Tensor


def factorise(delta: Tensor, outputs: Metric, inputs: Metric, rank: int | None = None) -> Factors:
    """The `rank` (None: all numerical) dominant ranks of `delta` `[m, n]` in the metric.

    Raises ValueError for NaN or a metric that is not positive.
    """
    out_root, in_root = root(outputs), root(inputs)
    image = whiten(delta, in_root)
    image = whiten(image.T, out_root).T
    left, sigma, right = thin_svd(image.contiguous(), rank)
    return Factors(
        left=unwhiten(left.T.contiguous(), out_root).T.contiguous(),
        sigma=sigma,
        right=unwhiten(right, in_root).contiguous(),
    )
