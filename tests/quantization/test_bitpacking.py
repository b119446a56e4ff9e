import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamix_hf.quantization.bitpacking import pack, packed_rows, unpack, unpack_columns

RUNS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 8)), min_size=1, max_size=5)


def random_codes(runs, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, 1 << b, (r, n), generator=generator) for r, b in runs]
    return torch.cat(parts).to(torch.uint8)


def slow_pack(codes, bits):
    """The layout word by word: planes of 8, 4, 2, 1 bits, high bits first."""
    rows = []
    for code, width in zip(codes.tolist(), bits, strict=True):
        code = code + [0] * (-len(code) % 8)
        low = width
        for plane in (8, 4, 2, 1):
            if not width & plane:
                continue
            low -= plane
            plane_rows = [[0] * (len(code) // 8) for _ in range(plane)]
            for position, value in enumerate(code):
                column, j = divmod(position, 8)
                piece = (value >> low) & ((1 << plane) - 1)
                plane_rows[j * plane // 8][column] |= piece << (j * plane % 8)
            rows += plane_rows
    return torch.tensor(rows, dtype=torch.uint8).view(len(rows), -(-codes.shape[1] // 8))


@given(runs=RUNS, n=st.integers(1, 70), seed=st.integers(0, 99))
def test_round_trip_and_layout(runs, n, seed):
    codes = random_codes(runs, n, seed)
    packed = pack(codes, runs)
    assert packed.shape == (packed_rows(runs), -(-n // 8))
    assert torch.equal(unpack(packed, runs, n), codes)
    if packed.numel():
        assert torch.equal(packed, slow_pack(codes, [b for r, b in runs for _ in range(r)]))


@given(runs=RUNS, n=st.integers(1, 70), index=st.lists(st.integers(0, 69), max_size=9))
def test_unpack_columns(runs, n, index):
    codes = random_codes(runs, n)
    index = torch.tensor([i % n for i in index], dtype=torch.int64)
    assert torch.equal(unpack_columns(pack(codes, runs), runs, index), codes[:, index])


@pytest.mark.parametrize("bits", range(9))
def test_every_width_over_several_chunks(bits):
    runs = [(37, bits), (3, 3)]
    codes = random_codes(runs, 9001)
    assert torch.equal(unpack(pack(codes, runs), runs, 9001), codes)


def test_a_slice_of_byte_columns_is_a_slice_of_the_vector():
    runs = [(2, 8), (3, 3), (4, 0), (5, 7)]
    codes = random_codes(runs, 96)
    shard = pack(codes, runs)[:, 4:9]
    assert torch.equal(unpack(shard, runs, 40), codes[:, 32:72])


def test_noncontiguous_and_empty():
    runs = [(4, 5)]
    codes = random_codes(runs, 48)[:, ::2]
    assert torch.equal(unpack(pack(codes, runs), runs, 24), codes)
    assert unpack(pack(codes[:0], []), [], 24).shape == (0, 24)
    assert unpack(pack(codes[:, :0], runs), runs, 0).shape == (4, 0)
    assert unpack_columns(pack(codes, runs), runs, torch.tensor([], dtype=torch.int64)).numel() == 0


def test_errors_name_the_problem():
    codes = torch.full((2, 9), 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"code 8 does not fit 3 bits \(ranks 0 to 1\)"):
        pack(codes, [(2, 3)])
    with pytest.raises(ValueError, match="code 8 does not fit 0 bits"):
        pack(codes, [(2, 0)])
    with pytest.raises(ValueError, match="do not cover the 2 ranks"):
        pack(codes, [(1, 4)])
    with pytest.raises(ValueError, match="bits <= 8"):
        pack(codes, [(2, 9)])
    with pytest.raises(ValueError, match="uint8"):
        pack(codes.long(), [(2, 4)])
    packed = pack(codes, [(2, 4)])
    with pytest.raises(ValueError, match=r"\[8, 3\].*\[8, 2\]"):
        unpack(packed, [(2, 4)], 17)
    with pytest.raises(ValueError, match=r"\[10, 2\]"):
        unpack(packed, [(2, 5)], 9)
    with pytest.raises(ValueError, match=r"\[10, 2\]"):
        unpack_columns(packed, [(2, 5)], torch.tensor([0]))
    with pytest.raises(ValueError, match="int64"):
        unpack_columns(packed, [(2, 4)], torch.tensor([0.5]))
    with pytest.raises(IndexError):
        unpack_columns(packed, [(2, 4)], torch.tensor([16]))
