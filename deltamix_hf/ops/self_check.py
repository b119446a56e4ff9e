"""The Triton kernels against float64 on one GPU: the program of a child of `isolated_check`.

    python -m deltamix_hf.ops.self_check cuda:0 "odd float16"

Every path that a layer takes runs once: one delta at one row, a few and many; two layers of one
input; a table of deltas; an embedding; factors on a min-max grid in memory. Real layers have sizes
that 16 divides, for which Triton compiles other code than for odd ones; both are cases. The last
line printed is the largest error.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.packed_delta import PackedDelta
from .dispatch import kernel_packed, triton_kernels

SIZES = {"aligned": (128, 256), "odd": (71, 139)}
_RUNS = [(2, 8, 8), (3, 8, 4), (5, 4, 3), (9, 3, 2), (18, 2, 2)]  # all that the default makes
_RANKS = sum(run[0] for run in _RUNS)


class _Layer:
    """A base weight and a delta about as large, on the device and in float64."""

    def __init__(self, case: str, device: torch.device, random: torch.Generator):
        size, dtype = case.split()
        (self.m, self.n), self.dtype = SIZES[size], getattr(torch, dtype)
        delta = random_delta(self.m, self.n, random)
        weight = torch.randn(self.m, self.n, generator=random).to(self.dtype)
        self.delta, self.exact = delta.dense().double(), weight.double()
        self.packed, self.weight = kernel_packed(delta.to(device)), weight.to(device)
        k = triton_kernels()
        self.table, self.rows_table = (
            k.Table(1, self.m, self.n, device, embedding) for embedding in (False, True)
        )
        for table in (self.table, self.rows_table):
            table.put(0, self.packed, self.dtype)

    def inputs(self, rows: int, random: torch.Generator) -> Tensor:
        return torch.randn(rows, self.n, generator=random).to(self.dtype)

    def expected(self, x: Tensor) -> Tensor:
        return x.double() @ (self.exact + self.delta).T


def random_delta(m: int, n: int, random: torch.Generator) -> PackedDelta:
    """Random codes of every width that the default method makes."""
    v_rows, u_rows = (sum(run[0] * run[side] for run in _RUNS) for side in (1, 2))
    v = torch.randint(256, (v_rows, -(-n // 8)), dtype=torch.uint8, generator=random)
    u = torch.randint(256, (u_rows, -(-m // 8)), dtype=torch.uint8, generator=random)
    scales = torch.full((_RANKS, 3), _RANKS**-0.25, dtype=torch.bfloat16).view(torch.int16)
    return PackedDelta(m, n, (0, 0), _RUNS, v, u, scales)


@torch.no_grad()
def errors(
    case: str, device: torch.device, counts: Sequence[int] = (1, 16, 40, 80)
) -> Iterator[float]:
    """The error of each product of `counts` rows as a share of its largest output."""
    k, random = triton_kernels(), torch.Generator().manual_seed(0)
    layer, other = (_Layer(case, device, random) for _ in range(2))
    plan = k.DecodePlan([layer.packed, other.packed], layer.dtype)
    for rows in counts:
        x = layer.inputs(rows, random)
        found = k.delta_linear(x.to(device), layer.weight, None, layer.packed)
        yield _distance(found, layer.expected(x))
        y = F.linear(x.to(device), layer.weight)
        k.grouped_add(y, x.to(device), layer.table, _all_rows(k, rows, device), None)
        yield _distance(y, layer.expected(x))
        if rows <= k.DECODE_ROWS:
            both = plan.linear(x.to(device), [layer.weight, other.weight], [None, None])
            for one, found in zip((layer, other), both, strict=True):
                yield _distance(found, one.expected(x))
    ids = torch.randint(layer.m, (16,), generator=random)
    y = F.embedding(ids.to(device), layer.weight)
    k.grouped_embed(y, ids.to(device), layer.rows_table, _all_rows(k, 16, device))
    yield _distance(y, (layer.exact + layer.delta)[ids])


def _all_rows(k: Any, rows: int, device: torch.device) -> Any:
    """Every row of a batch uses slot 0."""
    parts = torch.arange(rows), torch.tensor([0, rows]), torch.zeros(1)
    return k.Rows(*(part.to(device, torch.int32) for part in parts))


def _distance(found: Tensor, expected: Tensor) -> float:
    error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))


def main() -> None:
    """Print the largest error of a case on a device."""
    device, case = sys.argv[1:]
    print(max(errors(case, torch.device(device))), flush=True)


if __name__ == "__main__":
    main()
