"""PackedDelta: what goes in comes out, at every width, group size and odd shape.

Of one matrix, and of experts: joined, told apart again, chosen, and refused where damaged.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expert_cases import M, N, factors, some_experts
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import both, each_codebook, pack, quantizer, random_factors

from deltamix_hf import DeltaMixError
from deltamix_hf.quantization.packed_delta import PackedDelta, _ranges
from deltamix_hf.quantization.packed_layout import (
    DTYPES,
    layout_of,
    part_shapes,
    parts,
    rank_bytes,
)

cases = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=9).flatmap(
    lambda widths: st.tuples(
        st.just(widths),
        st.integers(1, 70),
        st.integers(1, 70),
        st.sampled_from([0, 1, 7, 32, 128, (0, 16), (0, 128), (7, 32)]),
        st.integers(0, 2**31),
        st.booleans(),
    )
)


@given(cases)
def test_round_trip(case):
    widths, m, n, group_size, seed, gaussian = case
    v_bits, u_bits = [v for v, _ in widths], [u for _, u in widths]
    v, u = random_factors(m, n, v_bits, u_bits, group_size, seed, gaussian)
    packed = PackedDelta.pack(v, u)
    # Ranks with an empty side are gone; the rest is sorted by width, and stable within a width.
    kept = [i for i, (a, b) in enumerate(widths) if a and b]
    order = sorted(kept, key=lambda i: (-v_bits[i], -u_bits[i]))
    assert packed.rank == len(kept) and packed.quantizer is quantizer(gaussian)
    assert torch.equal(packed.right(), v.dequantize()[order])
    assert torch.equal(packed.left(), u.dequantize()[order])
    # Shapes, dtypes and bytes are what the format promises.
    shapes = part_shapes(m, n, packed.runs, both(group_size), quantizer(gaussian))
    assert tuple(packed.tensors) == tuple(shapes) == parts(quantizer(gaussian))
    for part, tensor in packed.tensors.items():
        assert tuple(tensor.shape) == shapes[part] and tensor.dtype == DTYPES[part]
    assert packed.group_sizes == both(group_size)
    if kept:  # an empty matrix has no ranks to say it in
        found = layout_of(packed.ranks, both(group_size)[0])
        assert found == (packed.runs, packed.group_sizes)
    true_bytes = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert sum(packed.nbytes.values()) == true_bytes
    assert true_bytes == sum(
        rank_bytes(m, n, *widths[i], both(group_size), quantizer(gaussian)) for i in kept
    )


# docs/format.md: alpha and beta of widths 1 to 8
CUBIC = """
1.5957691 0
0.892898 0.0506908
0.471466 0.0115843
0.240515 0.00209738
0.121831 3.36750e-4
0.0617039 5.08628e-5
0.0312720 7.40792e-6
0.0158606 1.05197e-6
"""
CUBIC = [tuple(map(float, line.split())) for line in CUBIC.split("\n") if line]


def code_at(packed: torch.Tensor, first_row: int, bits: int, i: int) -> int:
    """Element i of the vector whose byte rows begin at `first_row`, bit plane by bit plane."""
    column, j = divmod(i, 8)
    code, row = 0, first_row
    for plane in (8, 4, 2, 1):
        if bits & plane:
            byte = int(packed[row + j * plane // 8, column])
            code = code << plane | byte >> (j * plane % 8) & ((1 << plane) - 1)
            row += plane
    return code


def decoded(packed: PackedDelta, v_side: bool) -> np.ndarray:
    """One side as docs/format.md says, an element at a time, from the stored tensors alone."""
    length, stored = (packed.n, packed.v) if v_side else (packed.m, packed.u)
    word = packed.ranks[0, 0].item() // 256
    size = packed.group_sizes[0] if v_side or not word else 2**word
    groups, all_groups = -(-length // size) if size else 1, packed.ranks.shape[1] - 1
    first_group = 0 if v_side else all_groups - groups
    words = packed.ranks.numpy()
    scales = (words[:, 1:].astype(np.int32) << 16).view(np.float32)  # bfloat16
    found = np.zeros((len(words), length), np.float32)
    row = zero_row = 0
    for k, word in enumerate(words[:, 0].tolist()):
        v_bits, u_bits = word % 16, word // 16 % 16
        bits = v_bits if v_side else u_bits
        for i in range(length):
            code = code_at(stored, row, bits, i)
            group = first_group + (i // size if size else 0)
            if packed.zeros is None:
                c, (alpha, beta) = code - (2**bits - 1) / 2, CUBIC[bits - 1]
                level = np.float32(alpha * c + beta * c**3)
            else:
                zero = code_at(packed.zeros, zero_row, max(v_bits, u_bits), group)
                assert 0 <= zero < 2**bits
                level = np.float32(code - zero)
            found[k, i] = level * scales[k, group]
        row, zero_row = row + bits, zero_row + max(v_bits, u_bits)
    return found


@each_codebook
@pytest.mark.parametrize("group_size", [0, 7, 16, (0, 16)])
def test_values_as_documented(group_size, gaussian):
    """Every width on both sides, odd sizes, by an independent reader of docs/format.md."""
    widths = [8, 7, 6, 5, 4, 3, 2, 1]
    packed, _ = pack(21, 35, widths, widths[::-1], group_size, gaussian=gaussian)
    assert packed.rank == 8
    assert np.array_equal(packed.right().numpy(), decoded(packed, v_side=True))
    assert np.array_equal(packed.left().numpy(), decoded(packed, v_side=False))


@each_codebook
@pytest.mark.parametrize("group_size", [0, 32, 128, (0, 32)])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (65, 33), (130, 257)])
def test_dense_is_the_product(m, n, group_size, gaussian):
    widths = [8, 3, 2, 2, 0, 1], [8, 4, 2, 3, 5, 1]
    packed, delta = pack(m, n, *widths, group_size, gaussian=gaussian)
    torch.testing.assert_close(packed.dense().double(), delta, rtol=1e-5, atol=1e-5)
    assert packed.dense().shape == (m, n) and packed.dense().dtype == torch.float32


@each_codebook
def test_the_order_of_ranks_does_not_change_the_delta(gaussian):
    one, delta = pack(40, 24, [2, 8, 3, 2], [2, 8, 3, 2], 0, gaussian=gaussian)
    assert one.runs == [(1, 8, 8), (1, 3, 3), (2, 2, 2)]
    torch.testing.assert_close(one.dense().double(), delta, rtol=1e-5, atol=1e-5)


@each_codebook
def test_every_rank_dropped_is_a_zero_delta(gaussian):
    packed, _ = pack(9, 17, [0, 0, 3], [0, 2, 0], 32, gaussian=gaussian)
    assert packed.rank == 0 and packed.runs == [] and packed.quantizer is quantizer(gaussian)
    assert sum(packed.nbytes.values()) == 0
    assert torch.equal(packed.dense(), torch.zeros(9, 17))


def test_documented_bytes():
    """docs/format.md, by hand: [64, 128] at group size 32, one rank of 3 + 2 bits."""
    packed, _ = pack(64, 128, [3], [2], 32)
    shapes = {part: tuple(tensor.shape) for part, tensor in packed.tensors.items()}
    assert shapes == {"v": (3, 16), "u": (2, 8), "ranks": (1, 1 + 4 + 2), "zeros": (3, 1)}
    assert int(packed.ranks[0, 0]) == 3 + 16 * 2
    assert packed.nbytes == {"payload": 48 + 16, "scales": 2 * 6 + 3, "metadata": 2}
    packed, _ = pack(64, 128, [3], [2], 0, gaussian=True)  # one scale a vector, no zero points
    shapes = {part: tuple(tensor.shape) for part, tensor in packed.tensors.items()}
    assert shapes == {"v": (3, 16), "u": (2, 8), "ranks": (1, 1 + 1 + 1)}
    assert packed.nbytes == {"payload": 48 + 16, "scales": 2 * 2, "metadata": 2}
    assert rank_bytes(64, 128, 3, 2, (0, 0), quantizer(True)) == 48 + 16 + 4 + 2


@pytest.mark.parametrize("width", [0, 9, 15, 16, 3 + 16 * 9, -1, 2**15 - 1])
def test_impossible_widths_are_refused(width):
    packed, _ = pack(8, 8, [3, 2], [3, 2], 0)
    packed.ranks[0, 0] = width
    with pytest.raises(DeltaMixError, match="bit width"):
        layout_of(packed.ranks, 0)


@pytest.mark.parametrize("exponent", [1, 3, 16, 127, -1])
def test_impossible_group_sizes_are_refused(exponent):
    packed, _ = pack(200, 8, [3, 2], [3, 2], (0, 64))
    packed.ranks[:, 0] += 256 * (exponent - 6)
    with pytest.raises(DeltaMixError, match="scale groups of U"):
        layout_of(packed.ranks, 0)


def test_ranks_of_two_group_sizes_are_refused():
    packed, _ = pack(200, 8, [3, 2], [3, 2], (0, 64))
    packed.ranks[0, 0] += 256
    with pytest.raises(DeltaMixError, match="scale groups of U"):
        layout_of(packed.ranks, 0)


def test_unsorted_ranks_are_refused():
    packed, _ = pack(8, 8, [3, 2], [3, 2], 0)
    with pytest.raises(DeltaMixError, match="not sorted"):
        layout_of(packed.ranks.flip(0), 0)


@pytest.mark.parametrize("shape", [(), (4,), (2, 0)])
def test_a_widths_tensor_without_widths_is_refused(shape):
    with pytest.raises(DeltaMixError, match="damaged"):
        layout_of(torch.ones(shape, dtype=torch.int16), 0)


# Experts


@each_codebook
def test_split_undoes_join(gaussian):
    experts = some_experts(gaussian)
    joined = PackedDelta.join(experts)
    assert set(joined.tensors) == set(parts(quantizer(gaussian), experts=True))
    assert joined.counts.tolist() == [3, 0, 1, 5, 1]
    for found, expected in zip(joined.split(), experts, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.runs == expected.runs
            assert torch.equal(found.dense(), expected.dense())
            assert found.v.data_ptr() != expected.v.data_ptr()
    assert joined.split()[3].u.untyped_storage().data_ptr() == joined.u.untyped_storage().data_ptr()


@each_codebook
def test_bytes_are_those_of_the_experts_and_four_each(gaussian):
    experts = some_experts(gaussian)
    each = sum(sum(packed.nbytes.values()) for packed in experts if packed is not None)
    assert sum(PackedDelta.join(experts).nbytes.values()) == each + 4 * len(experts)


@each_codebook
@pytest.mark.parametrize("chosen", [[0], [1], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_chosen_ranks_are_those_of_the_experts(gaussian, chosen):
    experts = some_experts(gaussian)
    found, owner = PackedDelta.join(experts).chosen(torch.tensor(chosen))
    widths = [(v, u) for count, v, u in found.runs for _ in range(count)]
    assert widths == sorted(widths, reverse=True)
    right, left = found.right(), found.left()
    for i, number in enumerate(chosen):
        mine = (owner == i).nonzero()[:, 0]
        expected = experts[number]
        if expected is None:
            assert not len(mine)
            continue
        assert torch.equal(right[mine], expected.right())
        assert torch.equal(left[mine], expected.left())


def test_ranges():
    found = _ranges(torch.tensor([5, 0, 7]), torch.tensor([2, 0, 3]))
    assert found.tolist() == [5, 6, 7, 8, 9]
    assert (
        _ranges(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).numel() == 0
    )


@each_codebook
def test_checked_takes_what_join_makes(gaussian):
    joined = PackedDelta.join(some_experts(gaussian))
    again = PackedDelta.checked(M, N, 0, joined.tensors, 5)
    assert again.group_sizes == (0, 0) and torch.equal(again.v, joined.v)
    meta = {**joined.tensors, "v": joined.v.to("meta"), "u": joined.u.to("meta")}
    assert PackedDelta.checked(M, N, 0, meta, 5).counts is joined.counts


def moved(counts: torch.Tensor, *changes: int) -> torch.Tensor:
    """Counts with these differences, the last of them 0."""
    return counts + torch.tensor([*changes, *[0] * (len(counts) - len(changes))]).int()


DAMAGE = {
    "fewer counts": ("counts", lambda t: t[:4], "counts are"),
    "counts of another dtype": ("counts", lambda t: t.long(), "counts are"),
    "a negative count": (
        "counts",
        lambda t: t + torch.tensor([-4, 4, 0, 0, 0]).int(),
        "do not fit",
    ),
    "one rank too many": (
        "counts",
        lambda t: t + torch.tensor([1, 0, 0, 0, 0]).int(),
        "do not fit",
    ),
    "more than there can be": ("counts", lambda t: moved(t, 22, 0, 0, -5, -17), "do not fit"),
    "a rank given to another": ("counts", lambda t: moved(t, -2, 0, 2), "not sorted"),
    "a missing byte row": ("v", lambda t: t[:-1], "dm_v"),
    "codes of another dtype": ("u", lambda t: t.to(torch.int8), "dm_u"),
    "ranks of no dimension": ("ranks", lambda t: t[0, 0], "do not fit"),
    "a width of 0": ("ranks", lambda t: t.clone().fill_(0), "bit width"),
    "a negative scale": ("ranks", lambda t: torch.cat([t[:, :1], -t[:, 1:]], 1), "a scale"),
    "two group sizes": (
        "ranks",
        lambda t: torch.cat([torch.cat([t[:3, :1] + 256 * 5, t[:3, 1:]], 1), t[3:]]),
        "scale groups",
    ),
}


@each_codebook
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(gaussian, damage):
    part, change, message = DAMAGE[damage]
    tensors = PackedDelta.join(some_experts(gaussian)).tensors
    with pytest.raises(DeltaMixError, match=message):
        PackedDelta.checked(M, N, 0, {**tensors, part: change(tensors[part])}, 5)


def test_zero_points_of_the_wrong_expert_are_refused():
    """A rank of 2 bits whose zero point has 8: only in the expert whose rank is wider elsewhere."""
    odd = factors([8, 2], [2, 2], gaussian=False)
    joined = PackedDelta.join([odd, factors([2], [2], gaussian=False, seed=4)])
    joined.zeros.fill_(255)
    with pytest.raises(DeltaMixError, match="zero point"):
        PackedDelta.checked(M, N, 0, joined.tensors, 2)


def test_no_ranks_at_all_are_refused():
    joined = PackedDelta.join(some_experts())
    empty = {part: tensor[:0] for part, tensor in joined.tensors.items()}
    with pytest.raises(DeltaMixError, match="no ranks"):
        PackedDelta.checked(M, N, 0, {**empty, "counts": joined.counts * 0}, 5)


@each_codebook
def test_all_ranks_at_8_bits_bound_every_part(gaussian):
    tensors = PackedDelta.join(some_experts(gaussian)).tensors
    bounds = part_shapes(M, N, [(5 * min(M, N), 8, 8)], (0, 0), quantizer(gaussian), 5)
    assert bounds.keys() == tensors.keys()
    for part, shape in bounds.items():
        assert all(a <= b for a, b in zip(tensors[part].shape, shape, strict=True))
