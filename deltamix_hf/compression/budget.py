"""Bytes: what a delta repo has for packed ranks, and what a rank costs at every pair of widths.

The promise is a share of the bf16 bytes of what differs from the base. Headers, guards and what is
stored whole are paid first. Rounding a rank's two vectors with relative errors d_v and d_u costs
1 − (1 − d_v)·(1 − d_u) of what dropping it would.
"""

import math
from collections.abc import Collection, Mapping

import torch

from ..allocation.whole_model import Choices
from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..quantization.packed_layout import DTYPES, GroupSizes, part_names, part_shapes, rank_bytes
from ..storage.names import GUARD
from ..storage.sizes import header_bytes, reference_bytes

# What GPTQ leaves of V's rounding error in C, from rxnfp and SmolLM2 at 1/16.
_V_GPTQ = 0.35


def plan_budget(
    shapes: Mapping[str, tuple[int, int]],
    overlay: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    guards: list[str],
    config: DeltaMixConfig,
    embeddings: Collection[str] = (),
    experts: Mapping[str, int] | None = None,
) -> tuple[int, int]:
    """Compute the promised bytes, and what headers, guards and overlay leave of them for ranks.

    `shapes` are [m, n] of the matrices to pack by module name, `embeddings` those of embeddings,
    `overlay` is (dtype, shape) of what is stored whole by tensor name, `guards` are tensor names.
    `experts` counts those of each 3-D parameter, whose matrices, `<parameter>.<number>`, are stored
    together. Raises a DeltaMixError, which names the smallest budget that works, if headers and
    overlay alone exceed it, or no matrix could keep even one rank.
    """
    quantizer, experts = config.method.quantizer, experts or {}
    reference = reference_bytes(shapes, {name: shape for name, (_, shape) in overlay.items()})
    total = config.budget(reference)
    entries = dict(overlay) | dict.fromkeys(guards, GUARD)
    whole = sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())
    whole += torch.int32.itemsize * sum(experts.values())  # counts of their ranks
    group_sizes = {name: config.method.group_sizes(name in embeddings) for name in shapes}
    for name, (m, n) in shapes.items():
        fused = name.rpartition(".")[0]
        number = experts.get(fused)
        names = part_names(name if number is None else fused, quantizer, number is not None)
        runs = [((number or 1) * min(m, n), 8, 8)]  # nothing is longer than all ranks at 8 bits
        shapes_of = part_shapes(m, n, runs, group_sizes[name], quantizer, number)
        entries |= {names[part]: (DTYPES[part], shape) for part, shape in shapes_of.items()}
    least = min(b for b in config.method.bits if b > 0)
    one_rank = sum(
        rank_bytes(m, n, least, least, group_sizes[name], quantizer)
        for name, (m, n) in shapes.items()
    )
    if config.method.allocation == "global":  # some matrix can keep one
        one_rank //= max(len(shapes), 1)
    fixed = whole + header_bytes(entries, total)
    if total < fixed + one_rank:
        needed = fixed + one_rank
        while needed < (more := whole + header_bytes(entries, needed) + one_rank):
            needed = more  # more bytes are longer offsets
        ratio = math.ceil((needed + 1) / reference * 1e6) / 1e6
        advice = f"ratio >= {ratio:.6f} or " if ratio <= 1 else ""
        raise DeltaMixError(
            f"the budget of {total:,} bytes ({total / reference:.4g} of the {reference:,} bf16 "
            f"bytes that differ) is too small: headers and the overlay take {fixed:,}, one "
            f"{least}-bit rank per matrix {one_rank:,}. Give {advice}budget_bytes >= {needed}"
        )
    return total, total - fixed


def rank_options(
    shape: tuple[int, int], group_sizes: GroupSizes, config: DeltaMixConfig
) -> tuple[Choices, list[tuple[int, int]]]:
    """List every pair of widths (V, U) of a rank of an [m, n] matrix, with its error and bytes."""
    quantizer = config.method.quantizer
    used = [b for b in config.method.bits if b > 0]
    pairs = [(v, u) for v in used for u in used if config.method.split_widths or v == u]
    left = quantizer.distortion
    error = [1 - (1 - _V_GPTQ * left[v]) * (1 - left[u]) for v, u in pairs]
    bytes_ = [rank_bytes(*shape, v, u, group_sizes, quantizer) for v, u in pairs]
    choices = Choices(
        torch.tensor([config.method.drop_penalty, *error], dtype=torch.float64),
        torch.tensor([0, *bytes_], dtype=torch.int64),
    )
    return choices, [(0, 0), *pairs]
