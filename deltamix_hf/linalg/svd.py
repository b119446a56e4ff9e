"""Thin SVD of a weight delta, by what its shape and spectrum allow.

Low rank (LoRA merged in float32): a randomized range finder of n / 32 columns with one power
iteration (Halko, Martinsson and Tropp, arXiv 0909.4061) is tried on matrices of 512 and more. The
energy it misses is computed, not estimated: at most LOST of the whole, or it is not used. At
2048 x 2048 and rank 64, on one CPU core, it takes 0.21 s and not 1.58 s; a try that fails adds 8 %.

Only leading ranks, less than half of all (`leading_svd`): subspace iteration in the Gram matrix
(Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4), a product and a QR decomposition a
step, until a step adds little to the energy that the subspace holds. At 4096 x 4096 and rank 745,
on one CPU core, it takes 8 s and not 24.

Any other: the Gram matrix of the smaller side. For m >= n: G = D^T D = V diag(sigma^2) V^T by
`eigh`, then U = D V / sigma. In float64 this is twice as fast as a float32 SVD on the deltas
measured and loses nothing that quantization could see. Memory beyond the result is O(min(m, n)^2):
rows are accumulated in blocks, so a 49152 x 576 embedding never needs a 49152 x 49152 matrix or a
float64 copy of itself.

Squaring costs precision at the bottom of the spectrum: float64 rounding in G puts a floor of about
sqrt(n * 2.2e-16) * sigma_max (4e-7 at n = 576) under the singular values. Values below
eps32 * sqrt(max(m, n)) * sigma_max are dropped, which lies above that floor and above the noise of
a difference of float32 weights. (The common rule eps * max(m, n) would, at 49152 rows in float32,
drop everything below 0.6 % of sigma_max: real ranks.)
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

_BLOCK_ROWS = 1024
_SMALLEST, _SHARE = 512, 32  # tried on matrices from this size, with this share of their ranks
# Energy that may be missed: a thousandth of what rounding to 8 bits does (3.5e-5).
LOST = 3.5e-8
# Subspace iteration: an eighth of columns more than asked for; it ends with the step that adds less
# than a tenth of what is missed, and after so many steps the whole is taken.
_SPARE, _GROWTH, _STEPS = 8, 0.1, 8


def thin_svd(delta: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular triplets of `delta` `[m, n]`: U `[m, k]`, sigma `[k]`, Vt `[k, n]`.

    k is the numerical rank, at most `min(m, n)` and at most `rank`; a zero delta has k = 0. Sigma
    is positive and descending. Results are float64 for a float64 delta and float32 otherwise.
    Raises ValueError if the delta is not a matrix or holds NaN or infinity.
    """
    if delta.ndim != 2:
        raise ValueError(f"delta must be a matrix, got shape {list(delta.shape)}")
    m, n = delta.shape
    if m < n:
        left, sigma, right = thin_svd(delta.t(), rank)
        return right.t().contiguous(), sigma, left.t().contiguous()
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    largest = _largest(delta)
    if largest == 0:
        return delta[:, :0].to(dtype), delta.new_zeros(0, dtype=dtype), delta[:0].to(dtype)
    if (found := _low_rank(delta, largest)) is not None:
        return _leading_of(found, rank, largest, dtype)
    try:
        values, vectors = _eigh(_gram(delta, largest))
    except LinAlgError:  # slower, and converges where divide and conquer did not
        vectors, values, _ = torch.linalg.svd(_gram(delta, largest))
        values, vectors = values.flip(0), vectors.flip(1)
    sigma = values.flip(0).clamp(min=0).sqrt()
    kept = _kept(sigma, m, rank)
    sigma, right = sigma[:kept], vectors[:, n - kept :].flip(1)  # by descending sigma
    del values, vectors  # 134 MB at 4096
    left = delta.new_empty(m, kept, dtype=dtype)
    scaled = right / (sigma * largest)
    for rows, out in zip(delta.split(_BLOCK_ROWS), left.split(_BLOCK_ROWS), strict=True):
        out.copy_(rows.to(torch.float64) @ scaled)
    return left, (sigma * largest).to(dtype), right.t().to(dtype).contiguous()


def leading_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`thin_svd` for `rank` triplets, nearly; raises as it does.

    What they miss of the delta came out 0.4 to 3.4 % above the least (spectra of noise, i^-1/2
    and i^-1), which no rounding to 2 to 4 bits would show.
    """
    if delta.ndim != 2:
        raise ValueError(f"delta must be a matrix, got shape {list(delta.shape)}")
    if delta.shape[0] < delta.shape[1]:
        left, sigma, right = leading_svd(delta.t(), rank)
        return right.t().contiguous(), sigma, left.t().contiguous()
    n, columns = delta.shape[1], rank + max(rank // _SPARE, _SPARE)
    largest = _largest(delta)
    found = None
    if n >= _SMALLEST and columns <= n // 2 and largest:
        found = _low_rank(delta, largest) or _subspace(delta, columns, largest)
    if found is None:
        return thin_svd(delta, rank)
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    return _leading_of(found, rank, largest, dtype)


def singular_values(delta: Tensor) -> Tensor:
    """Sigma of `thin_svd` alone, in a third of its time: float64, descending; raises as it does."""
    if delta.ndim != 2:
        raise ValueError(f"delta must be a matrix, got shape {list(delta.shape)}")
    delta = delta if delta.shape[0] >= delta.shape[1] else delta.t()
    largest = _largest(delta)
    if largest == 0:
        return delta.new_zeros(0, dtype=torch.float64)
    if (found := _low_rank(delta, largest)) is not None:
        sigma = found[1]
    else:
        gram = _gram(delta, largest)
        try:
            values = torch.linalg.eigvalsh(gram)
        except LinAlgError:
            values = torch.linalg.svdvals(gram).flip(0)
        sigma = values.flip(0).clamp(min=0).sqrt()
    return sigma[: _kept(sigma, len(delta))] * largest


def _leading_of(
    found: tuple[Tensor, Tensor, Tensor], rank: int | None, largest: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `rank` of the triplets of a delta / largest, as those of the delta."""
    left, sigma, right = found
    kept = _kept(sigma, len(left), rank)
    sigma = (sigma[:kept] * largest).to(dtype)
    return left[:, :kept].to(dtype).contiguous(), sigma, right[:kept].to(dtype).contiguous()


def _largest(delta: Tensor) -> float:
    """Size of the largest element, by which squares stay in range; ValueError for NaN, infinity."""
    if not delta.numel():
        return 0.0
    largest = max(abs(float(end)) for end in torch.aminmax(delta))  # both are NaN if one element is
    if not math.isfinite(largest):
        raise ValueError("the delta holds NaN or infinity")
    return largest


def _low_rank(delta: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """SVD of `delta / largest` [m, n], m >= n, float64, if n / 16 ranks hold all but LOST of it."""
    n = delta.shape[1]
    if n < _SMALLEST:
        return None
    random = torch.Generator("cpu").manual_seed(n)
    plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    probe = torch.randn(n, n // _SHARE, generator=random, **plain).to(delta.device)
    single = delta.to(torch.float32)
    # the power iteration is for directions of little energy, which a plain probe would blur
    basis = _orthonormal(single @ probe, largest)
    basis = _orthonormal(single.t() @ basis.float(), largest)
    basis = _orthonormal(single @ basis.float(), largest)  # [m, k]
    inner = basis.new_zeros(basis.shape[1], n)
    for rows, part in _blocks(delta, basis, largest):
        inner.addmm_(part.t(), rows)
    missed = total = 0.0
    for rows, part in _blocks(delta, basis, largest):
        total += float(rows.square().sum())
        missed += float((rows - part @ inner).square().sum())
    if missed > LOST * total:
        return None
    left, sigma, right = torch.linalg.svd(inner, full_matrices=False)
    return basis @ left, sigma, right


def _subspace(delta: Tensor, columns: int, largest: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets of `delta / largest` [m, n], m >= n, by subspace iteration, sigma float64.

    None if it has not converged. The Gram matrix only finds the subspace, in float32; the triplets
    in it are those of the delta (Rayleigh-Ritz).
    """
    n, single = delta.shape[1], delta.to(torch.float32)
    random = torch.Generator("cpu").manual_seed(n)
    plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    probe = torch.randn(n, columns, generator=random, **plain).to(delta.device)
    gram = torch.zeros(n, n, dtype=torch.float32, device=delta.device)
    for rows in single.split(_BLOCK_ROWS):
        gram.addmm_((rows / largest).t(), rows / largest)
    total, held = float(gram.diagonal().sum(dtype=torch.float64)), -math.inf
    probe = gram @ probe
    for _ in range(_STEPS):
        basis = torch.linalg.qr(probe)[0]
        probe = gram @ basis
        before, held = held, float((basis * probe).sum(dtype=torch.float64))
        if held - before <= _GROWTH * max(total - held, 0.0) + LOST * total:
            break
    else:
        return None
    basis = torch.linalg.qr(probe)[0]
    image = (single @ basis).double() / largest
    values, mix = torch.linalg.eigh(image.t() @ image)
    sigma, mix = values.flip(0).clamp(min=0).sqrt(), mix.flip(1)
    left = image @ (mix / sigma.clamp(min=LOST * sigma[0]))
    return left, sigma, (basis @ mix.to(basis)).t()


def _orthonormal(columns: Tensor, scale: float) -> Tensor:
    """An orthonormal basis of what `columns` [m, k] span, float64."""
    basis, _ = torch.linalg.qr(columns.to(torch.float64) / scale)
    return basis


def _blocks(delta: Tensor, basis: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `delta / scale` in float64 with those of the basis, a block at a time."""
    for rows, part in zip(delta.split(_BLOCK_ROWS), basis.split(_BLOCK_ROWS), strict=True):
        yield rows.to(torch.float64) / scale, part


def _gram(delta: Tensor, largest: float) -> Tensor:
    """DᵀD of D / largest, float64 [n, n]."""
    gram = delta.new_zeros(delta.shape[1], delta.shape[1], dtype=torch.float64)
    for rows in delta.split(_BLOCK_ROWS):
        rows = rows.to(torch.float64) / largest
        gram.addmm_(rows.t(), rows)
    return gram


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, which they may overwrite."""
    if gram.device.type != "cpu":
        return tuple(torch.linalg.eigh(gram))
    vectors = gram.t()  # by columns, as LAPACK wants it: no copy
    values = gram.new_empty(len(gram))
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values, vectors


def _kept(sigma: Tensor, longest: int, rank: int | None = None) -> int:
    """Numerical rank of a matrix by its descending `sigma` [k], at most `rank`; see above."""
    floor = torch.finfo(torch.float32).eps * longest**0.5
    kept = int((sigma > floor * sigma[0]).sum())
    return kept if rank is None else min(kept, rank)
