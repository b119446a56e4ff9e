"""Parts of a packed matrix hold the very values of the whole."""

from __future__ import annotations

import pytest
import torch
from test_packed import each_codebook, pack

from deltamix_hf.shard import cut

M, N = 48, 72
V_BITS, U_BITS = [8, 4, 4, 3, 2, 1, 0], [8, 4, 2, 3, 2, 5, 2]
GROUPS = [(0, 0), (0, 16), (24, 16), (10, 32)]
PARTS = [
    (range(0, M), range(0, N)),
    (range(0, 24), range(0, N)),
    (range(24, M), range(0, N)),
    (range(0, M), range(36, N)),  # not at a whole byte
    (range(9, 22), range(11, 61)),
]


@each_codebook
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("rows", "columns"), PARTS)
def test_a_part_holds_the_values_of_the_whole(gaussian, groups, rows, columns):
    whole, _ = pack(M, N, V_BITS, U_BITS, groups, gaussian=gaussian)
    part = cut(whole, rows, columns)
    assert (part.m, part.n) == (len(rows), len(columns))
    v, u = whole.right()[:, columns.start : columns.stop], whole.left()[:, rows.start : rows.stop]
    torch.testing.assert_close(part.right(), v, rtol=0, atol=0)
    torch.testing.assert_close(part.left(), u, rtol=0, atol=0)


def test_the_whole_is_not_copied():
    whole, _ = pack(M, N, V_BITS, U_BITS, 0)
    assert cut(whole, range(M), range(N)) is whole
    half = cut(whole, range(0, M // 2), range(N))
    assert half.v.data_ptr() == whole.v.data_ptr()


def test_what_a_part_takes_is_in_proportion():
    whole, _ = pack(M, N, V_BITS, U_BITS, 0, gaussian=True)
    half = cut(whole, range(M // 2, M), range(N))
    assert half.u.numel() == whole.u.numel() / 2
    assert half.group_sizes == (0, 0)
