"""Packed experts: joined, told apart again, chosen, and refused where they are damaged."""

from __future__ import annotations

import pytest
import torch
from expert_cases import M, N, factors, some_experts

from deltamix_hf import DeltaMixError
from deltamix_hf.quantization.packed_delta import PackedDelta, _ranges
from deltamix_hf.quantization.packed_layout import largest_parts, parts

BOTH = pytest.mark.parametrize("gaussian", [True, False], ids=["gaussian", "min-max"])


@BOTH
def test_split_undoes_join(gaussian):
    experts = some_experts(gaussian)
    joined = PackedDelta.join(experts)
    assert set(joined.tensors) == set(parts(gaussian, experts=True))
    assert joined.counts.tolist() == [3, 0, 1, 5, 1]
    for found, expected in zip(joined.split(), experts, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.runs == expected.runs
            assert torch.equal(found.dense(), expected.dense())
            assert found.v.data_ptr() != expected.v.data_ptr()
    assert joined.split()[3].u.untyped_storage().data_ptr() == joined.u.untyped_storage().data_ptr()


@BOTH
def test_bytes_are_those_of_the_experts_and_four_each(gaussian):
    experts = some_experts(gaussian)
    each = sum(sum(packed.nbytes.values()) for packed in experts if packed is not None)
    assert sum(PackedDelta.join(experts).nbytes.values()) == each + 4 * len(experts)


@BOTH
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


@BOTH
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


@BOTH
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


@BOTH
def test_largest_parts_bound_the_real_ones(gaussian):
    tensors = PackedDelta.join(some_experts(gaussian)).tensors
    bounds = largest_parts(M, N, (0, 0), gaussian, 5)
    assert bounds.keys() == tensors.keys()
    for part, (dtype, shape) in bounds.items():
        assert tensors[part].dtype == dtype
        assert all(a <= b for a, b in zip(tensors[part].shape, shape, strict=True))
