"""The quantizers that a codebook's name in `config.json` stands for: two classes, one interface.

They round the rank vectors x float32 `[k, n]`, row i at width `bits[i]` (int64 `[k]`, 0 to 8), with
scales float32 `[k, G]`, exact in bfloat16, one for every `group_size` elements of a row (0: for the
whole row), and zero points uint8 `[k, G]` or None:

- `fit` gives scales and zero points; `weights` `[n]` say what an error in each column costs;
- `encode` gives the nearest codes, uint8 `[k, n]`, `decode` their values, float32 `[k, n]`;
- `rounder` gives a function that rounds one element of each row (`uniform.Rounder`).

`name` is the codebook's, `zero_points` says whether it has them, `distortion` is the mean squared
error of each width 0..8 on a standard normal variable.
"""

from torch import Tensor

from .gaussian import GAUSSIAN, Gaussian
from .uniform import MIN_MAX, MinMax

Quantizer = MinMax | Gaussian
QUANTIZERS: dict[str, Quantizer] = {each.name: each for each in (MIN_MAX, GAUSSIAN)}


def quantizer_of(zeros: Tensor | None) -> Quantizer:
    """Tell the quantizer by what it leaves: zero points or none."""
    return GAUSSIAN if zeros is None else MIN_MAX
