"""Layers that read the same tensor (q/k/v, gate/up) compute h = x·V̂ᵀ together.

By Triton that is one launch for all. On a CPU it is one look-up of all their codes: at one token
the overhead of small tensor operations is most of the delta's time.

Which layers may share an input is known by name; whether they do is seen at run time: the first one
that is called computes h = x·V̂ᵀ for all, the others take theirs if they are called with the very
same tensor. If grouped layers share no input, the extra projection is wasted; after two misses the
group dissolves. With gradients, every layer is on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import cpu, low_rank
from ..ops.dispatch import TRITON, choose
from .layers import DeltaLinear, weight_of

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Cross-attention: its q reads another tensor than its k and v.
_CROSS = ("cross", "encdec", "encoder_attn")


@dataclass
class _Shared:
    """x, its h for all members, and the members that have not taken theirs yet."""

    x: Tensor
    h: Tensor
    waiting: list[int]


class SharedInput:
    """A group of layers with one input; holds h only until the last of them has taken it.

    Attributes:
        most_misses: after this many calls with other inputs the group dissolves.
    """

    most_misses = 2

    def __init__(self, members: list[DeltaLinear]):
        self.members = members
        self.misses = 0
        self._quick = all(
            cpu.supported(tuple(p.runs), p.zeros is None, p.group_sizes)
            for p in (member.packed() for member in members)
        )
        self._running: dict[int, _Shared] = {}  # by thread

    def usable(self, x: Tensor) -> bool:
        """Tell whether Triton or look-up runs, without gradients, on all members where x is."""
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        if choose(x.device) != TRITON and not (
            self._quick
            and x.device.type == "cpu"
            and x.dtype != torch.float64
            and not torch.compiler.is_compiling()
        ):
            return False
        return all(member.dm_v.device == x.device for member in self.members)

    def down_project(self, member: DeltaLinear, x: Tensor) -> tuple[Tensor, int]:
        """Return h of all members for x [..., n], and the column where this member's ranks begin.

        h is float32 [splits, rows, all ranks], partial sums.
        """
        index = self.members.index(member)
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        shared = self._running.get(thread)
        if shared is None or shared.x is not x or index not in shared.waiting:
            if shared is not None:
                self._miss()
            h = low_rank.cheapest(low_rank.down_project)(x, *_arguments(self.members))
            shared = self._running[thread] = _Shared(x, h, list(range(len(self.members))))
        shared.waiting.remove(index)
        if not shared.waiting:
            del self._running[thread]
        return shared.h, sum(_rank(m) for m in self.members[:index])

    def _miss(self) -> None:
        self.misses += 1
        if self.misses >= self.most_misses:
            for member in self.members:
                member.dm_shared_input = None


def link_shared_inputs(model: nn.Module) -> None:
    """Find the groups of a model; call it again when its layers have changed."""
    for name, parent in model.named_modules():
        if any(mark in name.lower() for mark in _CROSS):
            continue
        children = dict(parent.named_children())
        for names in NAMES:
            found = [c for n in names if isinstance(c := children.get(n), DeltaLinear)]
            members = [m for m in found if "dm_own" in m.__dict__]
            packed = {m: m.packed() for m in members}
            alike = [m for m, p in packed.items() if p.zeros is None and not any(p.group_sizes)]
            alike = [m for m in alike if weight_of(m).shape[1] == weight_of(alike[0]).shape[1]]
            for member in members:
                member.dm_shared_input = None
            if len(alike) > 1:
                group = SharedInput(alike)
                for member in alike:
                    member.dm_shared_input = group


def _rank(member: DeltaLinear) -> int:
    return sum(count for count, _, _ in member.dm_own["weight"].runs)


def _arguments(members: list[DeltaLinear]) -> tuple[Any, ...]:
    """The lists that `low_rank.down_project` takes."""
    flat = [[number for run in m.dm_own["weight"].runs for number in run] for m in members]
    return (
        [m.dm_v for m in members],
        [m.dm_u for m in members],
        [m.dm_ranks for m in members],
        [number for runs in flat for number in runs],
        [len(runs) for runs in flat],
        [weight_of(m).shape[0] for m in members],
    )
