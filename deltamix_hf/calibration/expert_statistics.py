"""Input and output moments of every expert, from the tokens that the router sent to it.

While the model runs, the experts compute as they always do when sorted by expert
(`ops/experts.py`), and each projection's rows and gradients are added up for each expert apart. G
is the sum over an expert's tokens divided by all predictions, so an expert that is seldom chosen
weighs little.

An expert that saw fewer than `FEWEST` tokens is left out: a metric of a handful of directions says
that all others are free, which they are not. It gets the mean weight, as layers do that are never
called.

Exact moments of 128 experts would take 45 MB each in Qwen3-30B-A3B, 279 GB in all. So an expert's
moments are sketched (`linalg/second_moments.py`) from such a size on, and with so few rows, that
all experts of a layer together take what one wide layer may.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..linalg.second_moments import FULL, SKETCH, SecondMoment
from ..nn.experts import Expert, slice_shape
from ..nn.layers import weight_of
from ..ops.experts import base_product, experts_forward

FEWEST = 32

Moments = tuple[SecondMoment, SecondMoment | None]  # of inputs, and of gradients if measured
_Observed = dict[str, dict[int, Moments]]  # parameter -> expert -> its moments


@contextmanager
def observed_experts(
    modules: Mapping[str, nn.Module], fisher: bool, seed: int = 0
) -> Iterator[dict[str, Moments]]:
    """Context manager: measure experts among `modules`; yields moments by name, as `observed`."""
    seen: dict[nn.Module, _Observed] = {}
    own: dict[str, Moments] = {}
    for name, expert in modules.items():
        if not isinstance(expert, Expert):
            continue
        fused = expert.fused
        m, n = slice_shape(fused.module, fused.leaf)
        gradients = expert_moment(m, fused.experts, seed) if fisher else None
        own[name] = expert_moment(n, fused.experts, seed), gradients
        seen.setdefault(fused.module, {}).setdefault(fused.leaf, {})[expert.number] = own[name]
    try:
        for module, observed in seen.items():
            object.__setattr__(module, "forward", MethodType(_measuring(observed), module))
        yield own
    finally:
        for module in seen:
            module.__dict__.pop("forward", None)


def expert_moment(dim: int, experts: int, seed: int = 0) -> SecondMoment:
    """Make the moment of one expert's rows [N, dim] that leaves as much memory to all `experts`."""
    share = math.isqrt(experts)
    return SecondMoment(dim, FULL // share, SKETCH // share, seed=seed)


def _measuring(observed: _Observed) -> Callable[..., Tensor]:
    """A `forward` of experts that adds up what goes in and what comes back."""

    def forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def project(name: str, x: Tensor, ends: Tensor) -> Tensor:
            y = base_product(module, name, weight_of(module, name), x, ends)
            bounds = [0, *ends.tolist()]

            def add(side: int, rows: Tensor) -> None:
                for number, moments in observed.get(name, {}).items():
                    if (moment := moments[side]) is not None:
                        moment.add(rows[bounds[number] : bounds[number + 1]])

            add(0, x)
            if y.requires_grad:
                y.register_hook(partial(add, 1))
            return y

        return experts_forward(module, hidden, top_k_index, top_k_weights, project)

    return forward
