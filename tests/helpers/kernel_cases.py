"""Inputs, tolerances and poisoned outputs for tests of the kernels."""

from __future__ import annotations

import deltamix_kernels as dk
import pytest
import torch
from packed_cases import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


EVERY = list(range(8, 0, -1))


FEW_BITS = (0, 2, 4)  # of models that the interpreter runs: every width is a tile of its own


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs begin as NaN, so that an element no program writes shows."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *shape, **kwargs):
        made = empty(self, *shape, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def packed_of(m, n, v_bits, u_bits, group_size, gaussian):
    packed, delta = pack(m, n, v_bits, u_bits, group_size, gaussian=gaussian)
    on = {k: t.to(DEVICE) for k, t in packed.tensors.items()}
    runs = tuple(packed.runs)
    kernel = dk.Packed(
        on["v"], on["u"], on["ranks"], on.get("zeros"), runs, m, n, packed.group_sizes
    )
    return kernel, delta.to(DEVICE)


def inputs(rows, n, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=random).to(DEVICE, dtype)


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())
