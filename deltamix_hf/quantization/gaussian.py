"""One Gaussian codebook per width: the levels a normal variable is best rounded to.

A rank vector of a whitened delta looks normal, so it is stored as codes into a fixed table and one
scale for the whole vector (one for every 128 tokens in embeddings), without a zero point. The table
of width b has 2**b levels, symmetric around 0. With the centred code c = code - (2**b - 1) / 2,

    level_b(c) = alpha_b * c + beta_b * c**3

alpha and beta minimise the mean squared error of a standard normal variable. A cubic instead of the
Lloyd-Max table costs 0.0 / 0.2 / 2.0 % more error at 2 / 3 / 4 bits and lets a kernel compute a
level with two multiply-adds instead of a look-up. Mean squared errors, for unit variance:

    bits                    1       2       3        4        5         6         7         8
    uniform, best step   0.3634  0.1188  0.03744  0.01154  0.003495  0.001040  3.04e-4   8.77e-5
    this cubic           0.3634  0.1175  0.03462  0.00969  0.002649  0.000716  1.92e-4   5.11e-5
    Lloyd-Max            0.3634  0.1175  0.03455  0.00950  0.002505  0.000644  1.74e-4   5.0e-5
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .uniform import Rounder, check_groups

# (alpha, beta) of widths 1..8; normative (docs/format.md).
CUBIC = (
    (1.5957691, 0.0),
    (0.892898, 0.0506908),
    (0.471466, 0.0115843),
    (0.240515, 0.00209738),
    (0.121831, 3.36750e-4),
    (0.0617039, 5.08628e-5),
    (0.0312720, 7.40792e-6),
    (0.0158606, 1.05197e-6),
)
# Mean squared error of each width 0..8 on a standard normal variable.
DISTORTION = (1.0, 0.36338, 0.117482, 0.034623, 0.0096878, 0.0026494, 7.161e-4, 1.920e-4, 5.109e-5)

# Widths share one search: the levels of width b are shifted by b * _SHIFT, which no level reaches.
_SHIFT = 16.0
_FIT_STEPS = 16
_NOTHING = 2.0**-100


def levels(bits: int) -> Tensor:
    """The 2**bits levels of one width, float32, ascending; width 0 has the single level 0."""
    if bits == 0:
        return torch.zeros(1, dtype=torch.float32, device="cpu")
    alpha, beta = CUBIC[bits - 1]
    c = torch.arange(2**bits, dtype=torch.float64, device="cpu") - (2**bits - 1) / 2
    return (alpha * c + beta * c**3).float()


# Made when this is imported, maybe within another default dtype or device: so both are said.
_LEVELS = [levels(b) for b in range(9)]
_TABLE = torch.cat(_LEVELS)
_FIRST = 2 ** torch.arange(9, device="cpu") - 1  # of each width in _TABLE
# Decision points of all widths in one ascending table; width b begins at (b - 1/2) shifts.
_EDGES = torch.cat(
    [
        part
        for b, table in enumerate(_LEVELS)
        for part in (
            table.new_tensor([_SHIFT * (b - 0.5)]),
            (table[1:] + table[:-1]) / 2 + _SHIFT * b,
        )
    ]
)
_AT_ONCE = 1 << 22  # elements


def encode(x: Tensor, bits: Tensor) -> Tensor:
    """Codes uint8 of the nearest levels; `x` in units of the scale, `bits` broadcast to it."""
    wide = bits.to(torch.int64)
    key = x.clamp(-7.5, 7.5) + wide * _SHIFT
    code = torch.bucketize(key, _EDGES.to(x.device)) - 1 - _FIRST.to(x.device)[wide]
    return code.to(torch.uint8)


def decode(codes: Tensor, bits: Tensor) -> Tensor:
    """Levels float32 of `codes`; `bits` broadcast to them."""
    index = codes.to(torch.int64) + _FIRST.to(codes.device)[bits.to(torch.int64)]
    return _TABLE.to(codes.device)[index]


def fit(x: Tensor, bits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scale float32 `[...]` of the groups `x` `[..., g]`, exactly representable in bfloat16.

    `weights` > 0, broadcast against `x`, say what an error of each element costs (None: the same).

    The best of several scales from 0.35 root mean squares up to the one that clips nothing, each
    refined by least squares. (Refining the root mean square alone stops far from the best where
    tails are heavy: at 8 bits with 64 times its error.) A group of zeros gets a scale next to 0,
    because no level is 0.
    """
    peak = x.abs().amax(-1)
    # squares stay in range
    sizes = (x.float().abs() / torch.where(peak > 0, peak, 1.0)[..., None]).flatten(0, -2)
    costs = None if weights is None else weights.expand_as(x).flatten(0, -2)
    widths, scale = bits.expand(peak.shape).flatten(), torch.empty_like(peak).flatten()
    for width in widths.unique().tolist():
        held = sizes.shape[1] + _FIT_STEPS * 2**width  # of a group at once
        for rows in (widths == width).nonzero()[:, 0].split(max(1, _AT_ONCE // held)):
            scale[rows] = _fit_width(sizes[rows], width, None if costs is None else costs[rows])
    return (scale.view(peak.shape) * peak).clamp(min=_NOTHING).to(torch.bfloat16).float()


def _fit_width(sizes: Tensor, width: int, costs: Tensor | None) -> Tensor:
    """Scales `[k]` of groups of one width by the sizes `[k, g]` of their elements, at most 1.

    With the sizes in order, those that meet one level lie between two places, and sums over them
    are differences of running sums: 0.1 us an element, where coding each for every scale took 1.2.
    """
    if costs is None:
        ordered, costs = sizes.sort(-1).values, torch.ones_like(sizes)
    else:
        ordered, order = sizes.sort(-1)
        costs = costs.gather(-1, order)
    weighed = costs.double() * ordered
    sums = [F.pad(part.cumsum(-1), (1, 0)) for part in (costs.double(), weighed)]  # [k, 1 + g]
    square = (weighed * ordered).sum(-1)
    rms = (square / sums[0][:, -1]).sqrt()
    narrowest = (0.35 * rms).clamp(min=_NOTHING)
    if width == 0:
        return narrowest.float()
    level = levels(width)[2 ** (width - 1) :].double().to(sizes.device)  # those above 0
    widest = rms.clamp(min=1 / float(level[-1]))
    steps = torch.linspace(0, 1, _FIT_STEPS, dtype=torch.float64, device=sizes.device)
    tried = narrowest[:, None] * (widest / narrowest)[:, None] ** steps  # [k, steps]
    edges = (tried[..., None] * (level[1:] + level[:-1]) / 2).flatten(1)
    places = torch.searchsorted(ordered, edges.to(ordered))
    below = [part.gather(1, places).view(*tried.shape, -1) for part in sums]
    jumps = [(level**power).diff() for power in (2, 1)]
    # over all elements: cost times the level's square, and cost times the level times the size
    among, along = (
        level[-1] ** power * part[:, -1:] - (under * jump).sum(-1)
        for power, part, under, jump in zip((2, 1), sums, below, jumps, strict=True)
    )
    found = along / among.clamp(min=1e-30)  # by least squares
    error = square[:, None] - found * along
    best = error.argmin(-1, keepdim=True)
    return torch.where(along > 0, found, narrowest[:, None]).gather(1, best)[:, 0].float()


def _some_rows(x: Tensor) -> list[slice]:
    """Rows of `x` `[k, n]`, a few at a time: indices into tables take 8 bytes an element."""
    step = max(1, _AT_ONCE // max(x.shape[1], 1))
    return [slice(start, start + step) for start in range(0, max(len(x), 1), step)]


def _grouped(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Whole groups `[k, G', g]` and the shorter last one `[k, rest]` (0 columns if there is none).

    A Gaussian fit must not see padding: zeros would shrink the scale.
    """
    k, n = x.shape
    width = group_size or n
    whole = n // width if width else 0
    return x[:, : whole * width].reshape(k, whole, width), x[:, whole * width :]


def _spread(scales: Tensor, n: int, group_size: int) -> Tensor:
    """Scales `[k, G]` repeated over their groups, `[k, n]`, or `[k, 1]` for one group."""
    if scales.shape[1] == 1:
        return scales.float()
    return scales.float().repeat_interleave(group_size, 1)[:, :n]


class Gaussian:
    """The quantizer of `codebook="gaussian"`; `quantizer.py` describes its methods."""

    name = "gaussian"
    zero_points = False
    distortion = DISTORTION

    def fit(
        self, x: Tensor, bits: Tensor, group_size: int, weights: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Find the scale of every group by `fit`."""
        inside, end = None, None
        if weights is not None:
            # A group whose errors cost nothing still needs a scale.
            weights = (weights.float() / weights.max().clamp(min=_NOTHING)).clamp(min=1e-6)
            inside, end = _grouped(weights[None], group_size)
        scales = []
        for some in _some_rows(x):
            body, rest = _grouped(x[some].contiguous(), group_size)
            found = [fit(body, bits[some, None], inside)] if body.shape[1] else []
            found += [fit(rest, bits[some], end)[:, None]] if rest.shape[1] else []
            scales.append(torch.cat(found, 1))
        return torch.cat(scales), None

    def encode(
        self, x: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Find the nearest levels: codes uint8 `[k, n]`."""
        codes = torch.empty_like(x, dtype=torch.uint8)
        for some in _some_rows(x):
            spread = _spread(scales[some], x.shape[1], group_size)
            codes[some] = encode(x[some].contiguous().float() / spread, bits[some, None])
        return codes

    def decode(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: Tensor, group_size: int
    ) -> Tensor:
        """Compute `level * scale`, float32 `[k, n]`; ValueError as `check_groups`."""
        check_groups(codes, group_size, scales)
        values = torch.empty_like(codes, dtype=torch.float32)
        for some in _some_rows(codes):
            spread = _spread(scales[some], codes.shape[1], group_size)
            torch.mul(decode(codes[some], bits[some, None]), spread, out=values[some])
        return values

    def rounder(self, bits: Tensor) -> Rounder:
        """Round to the nearest level times `scale`."""

        def rounded(values: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor) -> Tensor:
            found = encode(values / scale, bits)
            codes.copy_(found)
            return decode(found, bits).mul_(scale)

        return rounded


GAUSSIAN = Gaussian()
