"""The quantizers that a codebook's name in `config.json` stands for, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .gaussian import GAUSSIAN
from .uniform import MIN_MAX


class Quantizer(Protocol):
    """Round the rank vectors x float32 `[k, n]`, row i at width `bits[i]` (int64 `[k]`, 0 to 8).

    Scales are float32 `[k, G]`, exact in bfloat16, one for every `group_size` elements of a row
    (0: for the whole row); zero points uint8 `[k, G]`, or None.

    Attributes:
        name: the codebook's, in `config.json`.
        zero_points: whether it has them.
        distortion: mean squared error of each width, of a vector of unit variance.
    """

    name: str
    zero_points: bool
    distortion: tuple[float, ...]

    def fit(
        self, x: Tensor, bits: Tensor, group_size: int, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Fit scales and zero points; `weights` `[n]`: what an error in each column costs."""

    def encode(
        self, x: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Find the nearest codes, uint8 `[k, n]`."""

    def decode(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Give the values of codes uint8 `[k, n]`, float32."""

    def rounder(self, bits: Tensor) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]:
        """Prepare to round one element of each row.

        Returns:
            A function of values, scales, zero points (all float32 `[k]`) and the codes uint8 `[k]`
            that it writes; it gives the rounded values.
        """


QUANTIZERS: dict[str, Quantizer] = {each.name: each for each in (MIN_MAX, GAUSSIAN)}


def quantizer_of(zeros: Tensor | None) -> Quantizer:
    """Tell the quantizer by what it leaves: zero points or none."""
    return GAUSSIAN if zeros is None else MIN_MAX
