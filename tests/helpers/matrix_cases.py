"""Random matrices and the three methods, for tests of the pipeline."""

from __future__ import annotations

import torch

from deltamix_hf import DeltaMixConfig
from deltamix_hf.calibration.statistics import Metrics
from deltamix_hf.compression.matrix_pipeline import Compressed, Compressor
from deltamix_hf.method import METHODS as METHODS_BY_NAME
from deltamix_hf.quantization.packed_layout import rank_bytes

METHODS = list(METHODS_BY_NAME)


def random_delta(m, n, seed=0, decay=1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, min(m, n) + 1) ** -decay
    left = torch.randn(m, len(spectrum), generator=random) * spectrum
    return 0.01 * left @ torch.randn(len(spectrum), n, generator=random)


Matrix = tuple[torch.Tensor, Metrics]  # a delta, and its metrics


def matrix(delta, gram=None, fisher=None) -> Matrix:
    return delta, Metrics(fisher, gram)


def compress_all(
    matrices: dict[str, Matrix], budget: int, config: DeltaMixConfig
) -> dict[str, Compressed]:
    """Compress every matrix, largest ranks first so that slack fills up."""
    shapes = {name: tuple(delta.shape) for name, (delta, _) in matrices.items()}
    compressor = Compressor(shapes, (), matrices.__getitem__, budget, config)
    order = sorted(shapes, key=lambda name: -sum(shapes[name]))
    return {name: compressor.compress(name, *matrices[name]) for name in order}


def bytes_of_rank(m, n, bits, config: DeltaMixConfig) -> int:
    return rank_bytes(m, n, bits, bits, config.method.group_sizes(False), config.method.quantizer)


def true_error(delta, approx, gram) -> float:
    """tr(E C Eᵀ) / tr(D C Dᵀ) in float64."""
    delta, error = delta.double(), delta.double() - approx.double()
    metric = torch.eye(delta.shape[1]).double() if gram is None else gram.double()
    return float(((error @ metric) * error).sum() / ((delta @ metric) * delta).sum())
