"""Names of the tensors in a delta repo, format version 2 (normative text: docs/format.md).

A delta repo is an ordinary transformers repo whose weight files hold, instead of the model,

- packed tensors of each compressed matrix and of fused experts (`quantization/packed_layout.py`),
- full tensors: every other tensor that differs from the base, whole, under its model name,
- guards: one-byte tensors that make a loader that ignores the format fail instead of loading noise.

`config.json` names the base, its revision and a fingerprint of each of its tensors. Nothing of the
base is stored.
"""

import re
from collections.abc import Iterable, Set

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

    Raises a DeltaMixError if an `expected` matrix is missing, or one lacks a part that `quantizer`
    needs, or has one of the other codebook.
    """
    found: dict[tuple[str, bool], set[str]] = {}
    for name in names:
        if place := packed_part(name):
            found.setdefault(place[:2], set()).add(name)
    for name in sorted(expected):
        if (name, False) not in found and (name.rpartition(".")[0], True) not in found:
            raise DeltaMixError(
                f"the delta repo lacks the packed matrix {name}: the file is incomplete"
            )
    for (owner, experts), present in found.items():
        wanted = set(part_names(owner, quantizer, experts).values())
        check_present(present, wanted)
        if surplus := sorted(present - wanted):
            raise DeltaMixError(
                f"the delta repo holds {surplus[0]}, which its codebook has not: weights and "
                "config.json do not fit"
            )
    return [o for o, experts in found if not experts], [o for o, experts in found if experts]


def check_present(stored: Set[str], wanted: Set[str]) -> None:
    """Raise a DeltaMixError that names the first of the `wanted` names that is not stored."""
    if missing := sorted(wanted - stored):
        raise DeltaMixError(f"the delta repo lacks {missing[0]}: the file is incomplete")


def check_listed(stored: Set[str], listed: Set[str]) -> None:
    """Raise a DeltaMixError unless the files hold the very names that config.json lists."""
    check_present(stored, listed)
    if more := sorted(stored - listed):
        raise DeltaMixError(f"the delta repo holds {more[0]}, which its config.json does not list")


def is_guard(name: str) -> bool:
    return GUARD_SEPARATOR in name
