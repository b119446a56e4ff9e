"""Names of the tensors in a delta repo, format version 2 (normative text: docs/format.md).

A delta repo is an ordinary transformers repo whose weight files hold, instead of the model,

- the packed tensors `<module>.dm_v`, `.dm_u`, `.dm_ranks` and, on min-max grids, `.dm_zeros` of
  each compressed matrix,
- the same of fused experts, `<parameter>_dm_v` and so on, and `<parameter>_dm_counts`,
- full tensors: every other tensor that differs from the base, whole, under its model name,
- guards: one-byte tensors that make a loader that ignores the format fail instead of loading noise.

`config.json` names the base, its revision and a fingerprint of each of its tensors. Nothing of the
base is stored. This is the only module that knows these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set

import torch

from ..errors import DeltaMixError
from ..quantization.packed_layout import PARTS, PREFIX, part_names
from ..quantization.quantizer import Quantizer

ROWS = "dm_rows"  # rows of an embedding or head that the base has not, [rows, n]
GUARD_SEPARATOR = ":"
GUARD = (torch.uint8, (1,))  # dtype and shape of a guard
_PART = re.compile(rf"(.*)\.{PREFIX}({'|'.join(PARTS)})")
_EXPERT_PART = re.compile(rf"(.+)_{PREFIX}({'|'.join(PARTS)}|counts)")


def packed_part(name: str) -> tuple[str, bool, str] | None:
    """Split a packed tensor's name: what it is packed for, whether that is experts, and the part.

    `model.q_proj`, False and `v` of `model.q_proj.dm_v`; None for what is no packed tensor.
    """
    if found := _PART.fullmatch(name):
        return found[1], False, found[2]
    found = _EXPERT_PART.fullmatch(name)
    return (found[1], True, found[2]) if found else None


def packed_names(
    names: Iterable[str], quantizer: Quantizer, expected: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """Find the packed modules and packed 3-D parameters among tensor names.

    Args:
        quantizer: tells which parts there are.
        expected: matrices that must be there.

    Raises:
        DeltaMixError: a matrix is missing, lacks one of its tensors, or has one of the other
            codebook.
    """
    found: dict[bool, dict[str, set[str]]] = {False: {}, True: {}}
    for name in names:
        if place := packed_part(name):
            owner, experts, _ = place
            found[experts].setdefault(owner, set()).add(name)
    absent = sorted(
        name
        for name in expected
        if name not in found[False] and name.rpartition(".")[0] not in found[True]
    )
    if absent:
        raise DeltaMixError(
            f"the delta repo lacks the packed matrix {absent[0]}: the file is incomplete"
        )
    for experts, owners in found.items():
        for owner, present in owners.items():
            wanted = set(part_names(owner, quantizer, experts).values())
            if missing := sorted(wanted - present):
                raise DeltaMixError(f"the delta repo lacks {missing[0]}: the file is incomplete")
            if surplus := sorted(present - wanted):
                raise DeltaMixError(
                    f"the delta repo holds {surplus[0]}, which its codebook has not: weights and "
                    "config.json do not fit"
                )
    return list(found[False]), list(found[True])


def check_listed(stored: Set[str], listed: Set[str]) -> None:
    """Compare names in the files with those that config.json lists.

    Raises:
        DeltaMixError: names the first that is missing, or not listed.
    """
    if missing := sorted(listed - stored):
        raise DeltaMixError(f"the delta repo lacks {missing[0]}: the file is incomplete")
    if more := sorted(stored - listed):
        raise DeltaMixError(f"the delta repo holds {more[0]}, which its config.json does not list")


def guard_names(weights: Sequence[str], base_model_prefix: str) -> list[str]:
    """Name the guards; `weights` are the matrices read from the base, in the model's order.

    transformers strips "<prefix><any character>" from a key when the rest is a model key, so stock
    loading maps "<prefix>:<weight>" onto the real weight and stops on the shape mismatch [1], while
    the colon keeps the guard from being a real key of any repo. The guarded weight is one of the
    base model, not of a head that other classes lack; one guard is for classes whose keys have the
    prefix, the other for those without (AutoModel).
    """
    if not weights:
        return []
    inside = f"{base_model_prefix}."
    weight = next((name for name in weights if name.startswith(inside)), weights[0])
    inner = weight.removeprefix(inside)
    return [f"{base_model_prefix}{GUARD_SEPARATOR}{key}" for key in (inner, inside + inner)]


def is_guard(name: str) -> bool:
    return GUARD_SEPARATOR in name
