"""The CPU product by table look-up, against float64 and against the general path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import TOLERANCES, arguments, relative
from packed_cases import pack

from deltamix_hf.ops import lookup
from deltamix_hf.ops import low_rank as ops
from deltamix_hf.quantization import bitpacking
from deltamix_hf.quantization import gaussian as codebook

WIDTHS = (8, 4, 3, 2)


def products(packed, delta, x, z):
    """(found, expected) of both directions."""
    return [
        (lookup.low_rank(x, packed, transposed=False), x.double() @ delta.T),
        (lookup.low_rank(z, packed, transposed=True), z.double() @ delta),
    ]


@given(
    widths=st.lists(st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)), min_size=1),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    rows=st.integers(0, 5),
    u_group=st.sampled_from([0, 16, 32]),
)
@settings(max_examples=60)
def test_any_layout_against_float64(widths, m, n, rows, u_group):
    packed, delta = pack(
        m, n, *([w[i] for w in widths] for i in (0, 1)), (0, u_group), gaussian=True
    )
    random = torch.Generator().manual_seed(0)
    x, z = (torch.randn(rows, size, generator=random) for size in (n, m))
    for found, expected in products(packed, delta, x, z):
        assert found.shape == expected.shape
        # of the sizes that went in: terms may cancel
        size = max(x.norm(), z.norm()) * packed.right().norm() * packed.left().norm()
        assert (found - expected).norm() <= 1e-6 * size


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("u_group", [0, 32])
def test_every_dtype(dtype, u_group):
    packed, delta = pack(65, 130, WIDTHS, WIDTHS[::-1], (0, u_group), gaussian=True)
    x, z = torch.randn(3, 130).to(dtype), torch.randn(3, 65).to(dtype)
    for found, expected in products(packed, delta, x, z):
        # levels are float32
        tolerance = max(TOLERANCES[dtype], TOLERANCES[torch.float32])
        assert found.dtype == dtype and relative(found, expected) < tolerance


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_are_the_codebook(width):
    packed, _ = pack(8, 64, [width] * 3, [width] * 3, 0, gaussian=True)
    (part,) = lookup.parts(tuple(packed.runs), 1)
    levels = lookup._levels(lookup._right(packed), part)
    levels = levels.view(3, part.order, 8, -1).transpose(1, 2).reshape(3, 64)
    scales = packed.right() / levels
    assert torch.allclose(scales, scales[:, :1].expand_as(scales))


def test_supported():
    packed, _ = pack(8, 8, [8, 3], [2, 4], 0, gaussian=True)
    assert lookup.supported(packed) and lookup.supported(replace(packed, group_sizes=(0, 128)))
    assert not lookup.supported(replace(packed, group_sizes=(128, 0)))
    assert not lookup.supported(replace(packed, runs=[(3, 5, 2)]))
    assert not lookup.supported(pack(8, 8, [8, 3], [2, 4], 0)[0])


@pytest.mark.parametrize("u_group", [0, 32])
def test_rows_of_an_embedding(u_group):
    packed, delta = pack(65, 30, WIDTHS, WIDTHS[::-1], (0, u_group), gaussian=True)
    index = torch.tensor([[0, 64, 3], [3, 33, 31]])
    found = ops.low_rank_rows(index, *arguments(packed))
    assert found.shape == (2, 3, 30) and relative(found, delta[index]) < 1e-6


@pytest.mark.parametrize("length", [8, 40, 43])
def test_levels_in_the_elements_order(length):
    runs = [(3, 8), (2, 4), (4, 3), (1, 2), (2, 8)]
    bits = torch.tensor([b for count, b in runs for _ in range(count)])
    codes = torch.randint(0, 256, (len(bits), length)) % (2**bits)[:, None]
    codes = codes.to(torch.uint8)
    found = lookup.levels(bitpacking.pack(codes, runs), runs, length)
    torch.testing.assert_close(found, codebook.decode(codes, bits[:, None]))
