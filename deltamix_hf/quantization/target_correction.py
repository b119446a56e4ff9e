"""Left factors: the corrected target of DeltaMix (RTC) and the plain one of Delta-CoMe.

Once V is rounded to V_hat, the U of the SVD is no longer the best left factor. DeltaMix
(arXiv 2506.11087, "reconstruction target correction") re-fits it by ridge regression on the layer
inputs, with C = X X^T / N and S = diag(sigma):

    U* = D C V_hat^T S (S V_hat C V_hat^T S + lambda I)^-1,   lambda = damping * mean(diag(.))

where D is the FULL delta, dropped ranks included: they are partly predictable from the kept ones
(measured, held-out error 0.31 -> 0.16 with the full delta, 0.27 with only the kept ranks).

The format stores no sigma; it is folded into the scales of U. So both functions work with
T = U S and return the Hessian over ranks in T space,

    H = S^-1 (S V_hat C V_hat^T S + lambda I) S^-1 = V_hat C V_hat^T + lambda S^-2

GPTQ is equivariant under column scaling, hence rounding T with H is rounding U* with the published
Hessian. H is float64: the 1/sigma^2 terms span many orders of magnitude.
"""

import torch
from torch import Tensor

from ..linalg.cholesky import cholesky
from ..linalg.second_moments import Metric, energies, product, times
from ..linalg.whitened_svd import Factors

_BLOCK_ROWS = 256  # in float64 a row of 28672 takes 229 kB

# lambda of RTC as a share of mean(diag). The paper gives no value, and it decides everything where
# a few ranks hold most of the energy: the mean is then far above the tail ranks' own diagonal, and
# every one of them is shrunk. KL to the fine-tune, SmolLM2-135M pair at 1/16 (docs/log.md):
# 0.0040 at 1e-2, 0.00068 at 1e-4, 0.00017 at 1e-6, 0.00019 at 1e-8; without RTC 0.00049.
RTC_DAMPING = 1e-6
# Delta-CoMe: GPTQ's usual 1 %, as published.
PLAIN_DAMPING = 1e-2


def corrected_left_factor(
    delta: Tensor, gram: Metric, right: Tensor, sigma: Tensor, damping: float = RTC_DAMPING
) -> tuple[Tensor, Tensor]:
    """RTC: the best left factor T = U* S for the rounded right factor, and its Hessian.

    `delta` `[m, n]`, `gram` C `[n, n]` (None: identity), `right` V_hat `[k, n]`, `sigma` `[k]`
    positive. Returns T `[m, k]` in the dtype of `delta` and H float64 `[k, k]`. A rank whose
    V_hat is all 0 (0 bit) gets T = 0. Raises ValueError for wrong shapes or sigma <= 0.
    """
    if delta.shape[1] != right.shape[1]:
        raise ValueError(f"delta {list(delta.shape)} does not match right {list(right.shape)}")
    cross, scaled, root = _scaled_hessian(gram, right.to(delta.dtype), sigma, damping)
    if not len(sigma):
        return delta.new_zeros(len(delta), 0), scaled
    # T = D (C V^T S) K^-1 S with K the scaled Hessian; solved from the k x k side in float64.
    weights = torch.cholesky_solve((cross * sigma).t().to(torch.float64), cholesky(scaled))
    weights = (weights * sigma[:, None]).t().to(delta.dtype)  # [n, k]
    return delta @ weights, scaled / root


def plain_left_factor(
    left: Tensor, gram: Metric, right: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Delta-CoMe: the SVD's own T = U S `[m, k]` and the same Hessian, float64 `[k, k]`.

    `left` U `[m, k]`; the other arguments as in `corrected_left_factor`.
    """
    _, scaled, root = _scaled_hessian(gram, right, sigma, PLAIN_DAMPING)
    return left * sigma, scaled / root


def metric_error(delta: Tensor, left: Tensor, right: Tensor, gram: Metric) -> float:
    """tr((D - A) C (D - A)^T) / tr(D C D^T) for D `[m, n]` and A = left `[m, k]` right `[k, n]`.

    Products are formed in the dtype of `delta`, sums in float64, a block of rows at a time. The
    error of a zero delta is 0 if it is met exactly and infinite otherwise. Raises ValueError for
    other shapes.
    """
    if delta.shape != (shape := (len(left), right.shape[1])):
        raise ValueError(f"delta {list(delta.shape)} and its approximation {list(shape)} differ")
    error = total = 0.0
    inner = times(right, gram)
    for rows, near in zip(delta.split(_BLOCK_ROWS), left.split(_BLOCK_ROWS), strict=True):
        weighed = times(rows, gram)  # D C once for both: at 11008 inputs it is most of the work
        total += float((weighed.double() * rows).sum())
        error += float(((weighed - near @ inner).double() * (rows - near @ right)).sum())
    if total == 0:
        return float("inf") if error else 0.0
    return error / total


def _scaled_hessian(
    gram: Metric, right: Tensor, sigma: Tensor, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """C V^T `[n, k]`, K = S V C V^T S + lambda I `[k, k]` float64, and sigma_i sigma_j `[k, k]`.

    Raises ValueError for another number of sigmas, or one that is not positive.
    """
    if tuple(sigma.shape) != (len(right),):
        raise ValueError(f"sigma {list(sigma.shape)} does not match right {list(right.shape)}")
    if bool((sigma <= 0).any()):
        raise ValueError("sigma must be positive")
    cross = times(right, gram).t()
    sigma = sigma.to(torch.float64)
    root = sigma[:, None] * sigma
    scaled = (right @ cross).to(torch.float64) * root
    if len(sigma):
        scaled = (scaled + scaled.t()) / 2
        scaled.diagonal().add_(damping * scaled.diagonal().mean())
    return cross, scaled, root


def unbiased_gains(
    exact: Factors, left_hat: Tensor, right_hat: Tensor, outputs: Metric, inputs: Metric
) -> Tensor:
    """Gain of each rank, float32 `[k]`, that undoes the shrinking of rounded factors.

    Least squares pulls every kept component towards zero, the same way in all layers, and this adds
    up; random errors do not. With exact factors left, S and right, M = (S·leftᵀ·A·left_hat) ∘
    (right·C·right_hatᵀ) is how much of exact component i rounded component j carries (`left_hat`
    `[m, k]` with its sigma folded in, `right_hat` `[k, n]`), and d = M⁻¹·λ, λ_i the energy of
    component i, makes all of them whole. Clamped to 0.5-3. On rxnfp at 1/16 it takes KL from 0.0131
    to 0.0102, and with dropped ranks charged four times from 0.0131 to 0.0055.
    """
    sigma = exact.sigma.double()
    outer = product(exact.left, outputs, left_hat).double() * sigma[:, None]
    inner = (times(exact.right, inputs) @ right_hat.t()).double()
    energy = energies(exact.left.t(), outputs) * sigma**2 * energies(exact.right, inputs)
    matrix = outer * inner
    gains, info = torch.linalg.solve_ex(matrix, energy[:, None])
    if bool(info.any()) or not bool(torch.isfinite(gains).all()):
        return torch.ones(len(energy), device=energy.device)
    return gains[:, 0].float().clamp(0.5, 3.0)
