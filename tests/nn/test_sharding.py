"""A part of packed factors is the part of the matrix; which part is that of the weight."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from packed_cases import pack
from tiny_pairs import FAMILIES
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from deltamix_hf.nn.tensor_parallel import _own, is_shard, is_sharded, own, part_of, wanted

M, N = 300, 200
PARTS = {
    "all": torch.arange(M),
    "whole groups": torch.arange(128, 256),
    "cut groups": torch.arange(75, 150),
    "the short end": torch.arange(290, 300),
    "halves of two": torch.cat([torch.arange(0, 75), torch.arange(150, 225)]),
    "one": torch.tensor([171]),
}


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
@pytest.mark.parametrize("group_size", [0, 32, 128, (0, 128)])
@pytest.mark.parametrize("rows", PARTS)
@pytest.mark.parametrize("columns", ["all", "cut groups", "one"])
def test_a_part_is_that_part_of_the_matrix(gaussian, group_size, rows, columns):
    factors, _ = pack(M, N, [8, 5, 3, 1], [7, 2, 3, 2], group_size, gaussian=gaussian)
    chosen_rows, chosen_columns = PARTS[rows], PARTS[columns] % N
    chosen_columns = chosen_columns.unique()
    part = part_of(factors, chosen_rows, chosen_columns)
    assert torch.equal(part.right(), factors.right()[:, chosen_columns])
    assert torch.equal(part.left(), factors.left()[:, chosen_rows])
    assert (part.m, part.n) == (len(chosen_rows), len(chosen_columns))


def test_a_half_takes_half_the_codes():
    factors, _ = pack(M, N, [4, 2], [4, 2], 0, gaussian=True)
    part = part_of(factors, torch.arange(152), torch.arange(N))
    assert part.u.numel() == factors.u.numel() // 2
    assert torch.equal(part.v, factors.v) and torch.equal(part.ranks, factors.ranks)


@pytest.fixture
def second_of_three():
    """The mesh as the second of three processes sees it; nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield dist.init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


def share(tensor, placement, mesh):
    return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)


@pytest.mark.parametrize("shape", [(18, 30), (19, 31)])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(-1), Replicate()])
def test_its_indices_are_those_of_the_weight(second_of_three, shape, placement):
    weight = torch.arange(shape[0] * shape[1]).view(shape)
    shared = share(weight, placement, second_of_three)
    rows, columns = _own(shared, 0), _own(shared, 1)
    assert torch.equal(weight[rows][:, columns], shared.to_local())
    assert torch.equal(own(shared), shared.to_local()) and is_shard(shared)
    assert (len(rows), len(columns)) == tuple(shared.to_local().shape)


def test_fused_weights_are_shared_out_in_pieces(second_of_three):
    """The second third of either half, as `packed_colwise` has it."""
    weight = torch.arange(24 * 4).view(24, 4)
    shared = share(weight, _StridedShard(0, split_factor=2), second_of_three)
    assert _own(shared, 0).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert torch.equal(shared.to_local(), weight[_own(shared, 0)])


def test_a_plain_model_is_not_shared():
    model = FAMILIES["llama"].build()
    assert not is_sharded(model) and wanted(model) == []
    assert own(model.lm_head.weight) is model.lm_head.weight
