"""The packed part of experts' projections by the grouped kernels of many tenants: an expert a slot.

Sorted by expert, the rows of a projection are a batch whose rows use different deltas, which is
what those kernels are for. They find each row's factors on the device: nothing waits for the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels import TRITON, TRITON_DTYPES, capturing, choose, kernel_packed, triton_kernels
from .packed_experts import PackedExperts


class _Table:
    """Addresses of all experts' factors; `sound` if the kernels know them."""

    def __init__(self, packed: PackedExperts):
        self.addresses = _addresses(packed)
        device, factors = packed.v.device, packed.untied().split()
        self.slots = torch.arange(len(factors), dtype=torch.int32, device=device)
        self.table = triton_kernels().Table(len(factors), packed.m, packed.n, device)
        self.sound = all(
            own is None or self.table.put(number, kernel_packed(own))
            for number, own in enumerate(factors)
        )


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by `v`, which lives with its model


def add_by_kernels(y: Tensor, packed: PackedExperts, x: Tensor, ends: Tensor) -> bool:
    """y [S, m] += what the experts' factors make of x [S, n], in place; False: nothing was done.

    Rows and `ends` as for `expert_ops.Project`. Not for min-max grids, gradients or autocast.
    """
    fits = packed.zeros is None and y.dtype == x.dtype and x.dtype in TRITON_DTYPES
    if not fits or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if choose(x.device) != TRITON:
        return False
    found = _tables.get(packed.v)
    if found is None or found.addresses != _addresses(packed):  # the model was moved
        if capturing(x.device):
            return False
        found = _tables[packed.v] = _Table(packed)
    if not found.sound:
        return False
    k, numbers = triton_kernels(), torch.arange(len(x), dtype=torch.int32, device=x.device)
    rows = k.Rows(numbers, torch.cat([ends.new_zeros(1), ends]), found.slots)
    k.grouped_add(y, x, found.table, rows)
    return True


def _addresses(packed: PackedExperts) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in packed.tensors.values())
