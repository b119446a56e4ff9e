"""Thin SVD of a weight delta through the Gram matrix of its smaller side.

For m >= n: G = D^T D = V diag(sigma^2) V^T by `eigh`, then U = D V / sigma. In float64 this is
twice as fast as a float32 SVD on the deltas measured and loses nothing that quantization could
see. Memory beyond the result is O(min(m, n)^2): rows are accumulated in blocks, so a 49152 x 576
embedding never needs a 49152 x 49152 matrix or a float64 copy of itself.

Squaring costs precision at the bottom of the spectrum: float64 rounding in G puts a floor of about
sqrt(n * 2.2e-16) * sigma_max (4e-7 at n = 576) under the singular values. Values below
eps32 * sqrt(max(m, n)) * sigma_max are dropped, which lies above that floor and above the noise of
a difference of float32 weights. (The common rule eps * max(m, n) would, at 49152 rows in float32,
drop everything below 0.6 % of sigma_max: real ranks.)
"""

import torch

_BLOCK_ROWS = 4096


def thin_svd(
    delta: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest singular triplets of `delta` `[m, n]`: U `[m, k]`, sigma `[k]`, Vt `[k, n]`.

    k is the numerical rank, at most `min(m, n)` and at most `rank`; a zero delta has k = 0. Sigma
    is positive and descending. Results are float64 for a float64 delta and float32 otherwise.
    Raises ValueError if the delta is not a matrix or holds NaN or infinity.
    """
    if delta.ndim != 2:
        raise ValueError(f"delta must be a matrix, got shape {list(delta.shape)}")
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("the delta holds NaN or infinity")
    m, n = delta.shape
    if m < n:
        left, sigma, right = thin_svd(delta.t(), rank)
        return right.t().contiguous(), sigma, left.t().contiguous()
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    gram, largest = _gram(delta)
    if largest == 0:
        return (
            delta.new_zeros(m, 0, dtype=dtype),
            delta.new_zeros(0, dtype=dtype),
            delta.new_zeros(0, n, dtype=dtype),
        )
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.flip(0).clamp(min=0).sqrt()
    right = vectors.flip(1)  # [n, n], columns by descending sigma
    kept = int((sigma > _floor(m, n) * sigma[0]).sum())
    if rank is not None:
        kept = min(kept, rank)
    sigma, right = sigma[:kept], right[:, :kept].contiguous()
    left = delta.new_empty(m, kept, dtype=dtype)
    scaled = right / (sigma * largest)
    for start in range(0, m, _BLOCK_ROWS):
        rows = delta[start : start + _BLOCK_ROWS].to(torch.float64)
        left[start : start + _BLOCK_ROWS] = rows @ scaled
    return left, (sigma * largest).to(dtype), right.t().to(dtype).contiguous()


def singular_values(delta: torch.Tensor) -> torch.Tensor:
    """Sigma of `thin_svd` without the vectors, in a third of the time: float64, descending.

    Raises ValueError if the delta is not a matrix or holds NaN or infinity.
    """
    if delta.ndim != 2:
        raise ValueError(f"delta must be a matrix, got shape {list(delta.shape)}")
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("the delta holds NaN or infinity")
    gram, largest = _gram(delta if delta.shape[0] >= delta.shape[1] else delta.t())
    if largest == 0:
        return gram.new_zeros(0)
    sigma = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return sigma[sigma > _floor(*delta.shape) * sigma[0]] * largest


def _gram(delta: torch.Tensor) -> tuple[torch.Tensor, float]:
    """DᵀD of D scaled to largest element 1, float64 [n, n], and that element's size.

    Scaled, the squares of very small or large deltas stay in range.
    """
    n = delta.shape[1]
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    gram = delta.new_zeros(n, n, dtype=torch.float64)
    for rows in delta.split(_BLOCK_ROWS) if largest else ():
        rows = rows.to(torch.float64) / largest
        gram.addmm_(rows.t(), rows)
    return gram, largest


def _floor(m: int, n: int) -> float:
    """Singular values below this share of the largest are noise (module docstring)."""
    return torch.finfo(torch.float32).eps * max(m, n) ** 0.5
