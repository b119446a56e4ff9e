"""PackedFactors: what goes in comes out, at every width, group size and odd shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf import DeltaMixError, grid
from deltamix_hf.gptq import Rounded
from deltamix_hf.packed import DTYPES, PARTS, PackedFactors, part_shapes, rank_bytes, runs_of


def rounded(values: torch.Tensor, bits: torch.Tensor, group_size: int) -> Rounded:
    return Rounded(*grid.round_to_nearest(values, bits, group_size), group_size)


def random_factors(m, n, v_bits, u_bits, group_size, seed=0):
    """V̂ [k, n], Ûᵀ [k, m] as dense float32, and both rounded sides."""
    random = torch.Generator().manual_seed(seed)
    k = len(v_bits)
    v = rounded(torch.randn(k, n, generator=random), torch.tensor(v_bits), group_size)
    u = rounded(torch.randn(k, m, generator=random), torch.tensor(u_bits), group_size)
    return v, u


def pack(m, n, v_bits, u_bits, group_size, seed=0) -> tuple[PackedFactors, torch.Tensor]:
    """The packed factors and the delta [m, n] they must stand for."""
    v, u = random_factors(m, n, v_bits, u_bits, group_size, seed)
    packed = PackedFactors.pack(v, u, torch.tensor(v_bits), torch.tensor(u_bits), group_size)
    return packed, u.dequantize().double().T @ v.dequantize().double()


cases = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=9).flatmap(
    lambda widths: st.tuples(
        st.just(widths),
        st.integers(1, 70),
        st.integers(1, 70),
        st.sampled_from([0, 1, 7, 32, 128]),
        st.integers(0, 2**31),
    )
)


@given(cases)
def test_round_trip(case):
    widths, m, n, group_size, seed = case
    v_bits, u_bits = [v for v, _ in widths], [u for _, u in widths]
    v, u = random_factors(m, n, v_bits or [], u_bits or [], group_size, seed)
    packed = PackedFactors.pack(
        v,
        u,
        torch.tensor(v_bits, dtype=torch.int64),
        torch.tensor(u_bits, dtype=torch.int64),
        group_size,
    )
    # Ranks with an empty side are gone; the rest is sorted by width, and stable within a width.
    kept = [i for i, (a, b) in enumerate(widths) if a and b]
    order = sorted(kept, key=lambda i: (-v_bits[i], -u_bits[i]))
    assert packed.rank == len(kept)
    assert torch.equal(packed.right(), v.dequantize()[order])
    assert torch.equal(packed.left(), u.dequantize()[order])
    # Shapes, dtypes and bytes are what the format promises.
    shapes = part_shapes(m, n, packed.runs, group_size)
    for part in PARTS:
        tensor = packed.tensors[part]
        assert tuple(tensor.shape) == shapes[part] and tensor.dtype == DTYPES[part]
    assert runs_of(packed.ranks) == packed.runs
    true_bytes = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert sum(packed.nbytes.values()) == true_bytes
    assert true_bytes == sum(rank_bytes(m, n, *widths[i], group_size) for i in kept)


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (65, 33), (130, 257)])
def test_dense_is_the_product(m, n, group_size):
    packed, delta = pack(m, n, [8, 3, 2, 2, 0, 1], [8, 4, 2, 3, 5, 1], group_size)
    torch.testing.assert_close(packed.dense().double(), delta, rtol=1e-5, atol=1e-5)
    assert packed.dense().shape == (m, n) and packed.dense().dtype == torch.float32


def test_the_order_of_ranks_does_not_change_the_delta():
    one, delta = pack(40, 24, [2, 8, 3, 2], [2, 8, 3, 2], 0)
    assert one.runs == [(1, 8, 8), (1, 3, 3), (2, 2, 2)]
    torch.testing.assert_close(one.dense().double(), delta, rtol=1e-5, atol=1e-5)


def test_every_rank_dropped_is_a_zero_delta():
    packed, _ = pack(9, 17, [0, 0, 3], [0, 2, 0], 32)
    assert packed.rank == 0 and packed.runs == []
    assert sum(packed.nbytes.values()) == 0
    assert torch.equal(packed.dense(), torch.zeros(9, 17))


def test_documented_bytes():
    """docs/format.md, by hand: [64, 128] at group size 32, one rank of 3 + 2 bits."""
    packed, _ = pack(64, 128, [3], [2], 32)
    shapes = {part: tuple(tensor.shape) for part, tensor in packed.tensors.items()}
    assert shapes == {"v": (3, 16), "u": (2, 8), "ranks": (1, 1 + 4 + 2), "zeros": (3, 1)}
    assert int(packed.ranks[0, 0]) == 3 + 16 * 2
    assert packed.nbytes == {"payload": 48 + 16, "scales": 2 * 6 + 3, "metadata": 2}


@pytest.mark.parametrize("width", [0, 9, 15, 16, 3 + 16 * 9, -1, 2**15 - 1])
def test_impossible_widths_are_refused(width):
    packed, _ = pack(8, 8, [3, 2], [3, 2], 0)
    packed.ranks[0, 0] = width
    with pytest.raises(DeltaMixError, match="bit width"):
        runs_of(packed.ranks)


def test_unsorted_ranks_are_refused():
    packed, _ = pack(8, 8, [3, 2], [3, 2], 0)
    with pytest.raises(DeltaMixError, match="not sorted"):
        runs_of(packed.ranks.flip(0))


@pytest.mark.parametrize("shape", [(), (4,), (2, 0)])
def test_a_widths_tensor_without_widths_is_refused(shape):
    with pytest.raises(DeltaMixError, match="damaged"):
        runs_of(torch.ones(shape, dtype=torch.int16))
