"""Choosing a width for every rank of one matrix under a byte budget.

`solve` is the DeltaMix 0/1 program (arXiv 2506.11087) over an error table E `[k, B]`:

    min  sum_ib E_ib f_ib    s.t.  sum_b f_ib = 1 for each i,  sum_ib cost_ib f_ib <= budget,
                                   f_ib <= y_b,  sum_b y_b <= f_max   (only if f_max is given)

The y variables are enumerated: every set of f_max widths is bounded by its relaxation, sets are
solved (`knapsack`) best bound first, and a set whose bound reaches the best error so far never is.
The result is deterministic and the exact optimum, to 1e-10 of its error.

Measured on one Zen 4 core over 1920 synthetic tables of 576 to 4096 ranks x 6 widths, half with
f_max = 3: median 0.04 s, 99 % below 0.6 s; the slowest seen in any sweep took 2.0 s of CPU.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .knapsack import Allocation, improve, relax

# Delta-CoMe's published bands: (ranks, bits); all further ranks are at the last width.
_BANDS = ((2, 8), (32, 3))
_LAST_WIDTH = 2


def bands(ranks: int, costs: Mapping[int, int], budget: int) -> Tensor:
    """Delta-CoMe widths int64 `[ranks]` within `budget` bytes.

    `costs` are the bytes of one rank at 2, 3 and 8 bit; at 0 it costs nothing. Bands are filled in
    order, so a budget too small for the published bands ends inside one; what a band cannot use
    goes to the next, cheaper one.
    """
    bits = torch.zeros(ranks, dtype=torch.int64)
    filled = 0
    for count, width in (*_BANDS, (ranks, _LAST_WIDTH)):
        taken = min(count, ranks - filled, budget // costs[width])
        bits[filled : filled + taken] = width
        filled, budget = filled + taken, budget - taken * costs[width]
    return bits


def solve(
    table: Tensor, costs: Tensor | Sequence[int], budget: int, f_max: int | None = None
) -> Allocation:
    """Choices (columns of the table) of least total error within `budget` bytes.

    `table` has errors >= 0, float `[k, B]`, `costs` bytes, int `[B]` or `[k, B]`; at most `f_max`
    distinct columns are used. Raises ValueError if the cheapest choice exceeds the budget, or for
    shapes or values out of range.
    """
    errors, prices = _checked(table, costs)
    if f_max is not None and f_max < 1:
        raise ValueError(f"f_max must be at least 1, got {f_max}")
    scale, count = errors.max(initial=0.0) or 1.0, errors.shape[1]
    columns_of = map(np.asarray, itertools.combinations(range(count), min(f_max or count, count)))
    relaxations = [(c, relax(errors[:, c] / scale, prices[:, c], budget)) for c in columns_of]
    parts = [(columns, relaxed) for columns, relaxed in relaxations if relaxed is not None]
    if not parts:
        least = int(prices.min(axis=1).sum())
        limit = "" if f_max is None else f" with at most {f_max} widths"
        raise ValueError(f"a budget of {budget} bytes pays no choice{limit}; least is {least}")
    parts.sort(key=lambda part: part[1].bound)
    columns, first = min(parts, key=lambda part: part[1].error)
    best, picked, bound = first.error, columns[first.choice], math.inf
    for columns, relaxed in parts:
        if relaxed.bound >= best:
            break  # nor can any later set be better
        choice, best, proven = improve(relaxed, best)
        bound = min(bound, proven)
        if choice is not None:
            picked = columns[choice]
    rows = np.arange(len(errors))
    error, spent = math.fsum(errors[rows, picked]), int(prices[rows, picked].sum())
    if spent > budget:
        raise RuntimeError(f"allocation spends {spent} of {budget} bytes")
    return Allocation([torch.from_numpy(picked)], error, max(0.0, min(bound * scale, error)), spent)


def _checked(table: Tensor, costs: Tensor | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Errors float64 and prices int64, both `[k, B]`."""
    errors = np.asarray(torch.as_tensor(table).detach().cpu().numpy(), dtype=np.float64)
    prices = torch.as_tensor(costs).cpu().numpy()
    if errors.ndim != 2 or errors.shape[1] == 0:
        raise ValueError(f"the table must be [k, B], got {list(errors.shape)}")
    if prices.dtype.kind not in "iu" or prices.shape not in (errors.shape, errors.shape[1:]):
        raise ValueError(
            f"costs must be integers [{errors.shape[1]}] or {list(errors.shape)}, "
            f"got {prices.dtype} {list(prices.shape)}"
        )
    if not np.isfinite(errors).all() or (errors < 0).any() or (prices < 0).any():
        raise ValueError("errors and costs must be finite and not negative")
    return errors, np.broadcast_to(prices.astype(np.int64), errors.shape)
