"""The delta as ranks in order of what they are worth: SVD in the metric of the layer.

With A on outputs and C on inputs, tr((ΔW−D)ᵀ·A·(ΔW−D)·C) over all D of rank k is least for

    P·S·Qᵀ = SVD(L_Aᵀ·ΔW·L_C),    left = L_A⁻ᵀ·P  [m, k],    right = Qᵀ·L_C⁻¹  [k, n]

with L·Lᵀ the metrics: ΔW ≈ left·diag(S)·right, columns of `left` orthonormal in A, rows of `right`
orthonormal in C, and S² is what each rank's absence costs. Identity metrics give the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .second_moments import Metric, Root, root, unwhiten, unwhiten_left, whiten, whiten_left
from .svd import leading_svd, singular_values, thin_svd


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ left·diag(sigma)·right: `[m, k]`, descending positive `[k]`, `[k, n]`, float32."""

    left: Tensor
    sigma: Tensor
    right: Tensor

    def kept(self, ranks: Tensor) -> Factors:
        """The ranks of a mask bool `[k]`."""
        if bool(ranks.all()):
            return self
        return Factors(self.left[:, ranks], self.sigma[ranks], self.right[ranks])


def factorise(
    delta: Tensor,
    outputs: Metric,
    inputs: Metric,
    rank: int | None = None,
    damping: tuple[float, float] = (0.0, 0.0),
    nearly: bool = False,
) -> Factors:
    """The `rank` (None: all numerical) dominant ranks of `delta` `[m, n]` in the metric.

    `damping`: shares of the mean diagonals added to `outputs` and `inputs`. `nearly`: those of
    `leading_svd`. Raises ValueError for NaN or a metric that is not positive.
    """
    out_root, in_root = root(outputs, damping[0]), root(inputs, damping[1])
    image = _image(delta, out_root, in_root)
    left, sigma, right = (
        leading_svd(image, rank) if nearly and rank is not None else thin_svd(image, rank)
    )
    del image
    left, right = unwhiten_left(left, out_root), unwhiten(right, in_root)
    return Factors(left.contiguous(), sigma, right.contiguous())


def spectrum(
    delta: Tensor, outputs: Metric, inputs: Metric, damping: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Sigma of `factorise` alone, in a third of its time: float64, descending; errors as there."""
    return singular_values(_image(delta, root(outputs, damping[0]), root(inputs, damping[1])))


def _image(delta: Tensor, out_root: Root, in_root: Root) -> Tensor:
    """L_Aᵀ·ΔW·L_C `[m, n]`, a new tensor."""
    image = delta.clone() if in_root is None else whiten(delta, in_root)
    return whiten_left(image, out_root)
