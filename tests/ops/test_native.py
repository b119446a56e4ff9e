"""The native op of a CPU against float64; what it cannot read goes another way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import TOLERANCES, arguments, relative
from packed_cases import pack

from deltamix_hf.ops import low_rank as ops
from deltamix_hf.ops import native
from deltamix_hf.quantization.packed_delta import PackedDelta

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")

WIDTH = st.integers(1, 8)
LAYOUT = 130, 257, [8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors are full of NaN: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def low_rank(x, packed, transposed=False):
    (words,) = native.words_of(packed)
    return native.products(x, [(words, len(x))], transposed)


def of_several(deltas, counts):
    return [(native.words_of(delta)[0], n) for delta, n in zip(deltas, counts, strict=True)]


def within(found, expected, *sizes):
    """Of the sizes that went in: terms may cancel."""
    bound = 1e-6 * max(1e-30, float(torch.stack([size.norm() for size in sizes]).prod()))
    return found.shape == expected.shape and float((found - expected).norm()) <= bound


@given(
    widths=st.lists(st.tuples(WIDTH, WIDTH), max_size=9),
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    rows=st.integers(0, 40),
    groups=st.sampled_from([(0, 0), (0, 16), (0, 128), (8, 16), (16, 16), (64, 32)]),
)
@settings(max_examples=150)
def test_any_layout_against_float64(widths, m, n, rows, groups):
    sides = ([w[i] for w in widths] for i in (0, 1))
    packed, delta = pack(m, n, *sides, groups, gaussian=True)
    random = torch.Generator().manual_seed(0)
    x, z = (torch.randn(rows, size, generator=random) for size in (n, m))
    factors = packed.right().double(), packed.left().double()
    assert within(low_rank(x, packed), x.double() @ delta.T, x, *factors)
    assert within(low_rank(z, packed, True), z.double() @ delta, z, *factors)
    index = torch.randint(m, (rows,), generator=random)
    found = native.rows(index, of_several([packed], [rows]))
    assert within(found, delta[index], torch.ones(rows, m), *factors)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("m, n", [(64, 128), (1, 1), (8, 1000), (259, 77)])
@pytest.mark.parametrize("rows", [1, 3, 8, 15, 33])
def test_every_width_at_odd_and_aligned_sizes(width, m, n, rows):
    packed, delta = pack(m, n, [width] * 3, [9 - width] * 3, 0, gaussian=True)
    x = torch.randn(rows, n)
    found = low_rank(x, packed)
    assert within(found, x.double() @ delta.T, x, packed.right(), packed.left())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [2, 50])
def test_every_dtype(dtype, rows):
    packed, delta = pack(*LAYOUT, (0, 32), gaussian=True)
    x = torch.randn(rows, 257).to(dtype)
    found = low_rank(x, packed)
    assert found.dtype == dtype and relative(found, x.double() @ delta.T) < TOLERANCES[dtype]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_does_not_depend_on_others_or_on_threads(transposed):
    packed, _ = pack(600, 900, [8, 4, 3, 2] * 30, [8, 4, 3, 2] * 30, 0, gaussian=True)
    x = torch.randn(29, 600 if transposed else 900)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = low_rank(x, packed, transposed)
        torch.set_num_threads(1)
        assert torch.equal(together, low_rank(x, packed, transposed))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([low_rank(row, packed, transposed) for row in x.split(1)])
    assert torch.equal(together, alone)
    some = torch.cat([low_rank(part, packed, transposed) for part in x.split(6)])
    assert torch.equal(together, some)


def test_several_deltas_in_one_call_are_each_alone():
    layouts = ([4, 3, 2], [8, 3, 1]), ([2] * 9, [2] * 9), ([7], [5]), ([3], [3])
    deltas = [pack(70, 131, *bits, 0, seed=i, gaussian=True)[0] for i, bits in enumerate(layouts)]
    counts = 2, 9, 0, 40
    x = torch.randn(sum(counts), 131)
    found = native.products(x, of_several(deltas, counts))
    each = [low_rank(p, d) for p, d in zip(x.split(counts), deltas, strict=True)]
    assert torch.equal(found, torch.cat(each))
    index = torch.randint(70, (51,))
    found = native.rows(index, of_several(deltas, counts))
    each = [
        native.rows(own, of_several([delta], [len(own)]))
        for own, delta in zip(index.split(counts), deltas, strict=True)
    ]
    assert torch.equal(found, torch.cat(each))


def test_experts_take_their_rows():
    own = [pack(40, 24, [b] * 2, [b] * 2, 0, seed=b, gaussian=True)[0] for b in (2, 3)]
    packed, sizes = PackedDelta.join([own[0], None, own[1]]), (3, 2, 35)
    x = torch.randn(40, 24)
    parts = list(zip(native.words_of(packed), sizes, strict=True))
    found = native.products(x, parts).split(sizes)
    assert torch.equal(found[0], low_rank(x[:3], own[0]))
    assert torch.equal(found[1], torch.zeros(2, 40))
    assert torch.equal(found[2], low_rank(x[5:], own[1]))


def test_unaligned_and_strange_inputs():
    packed, delta = pack(*LAYOUT, 0, gaussian=True)
    whole = torch.randn(7 * 257 + 3)
    for x in whole[1:-2].view(7, 257), torch.randn(257, 4).T, torch.randn(3, 257)._neg_view():
        expected = x.double() @ delta.T
        assert within(low_rank(x, packed), expected, x, packed.right(), packed.left())


def test_nan_and_infinity_stay_in_their_rows():
    packed, _ = pack(*LAYOUT, 0, gaussian=True)
    x = torch.randn(9, 257)
    expected = low_rank(x, packed)
    bad = x.clone()
    bad[4, 8], bad[7, 256] = torch.nan, torch.inf
    found = low_rank(bad, packed)
    others = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(found[others], expected[others]) and not found[[4, 7]].isfinite().any()


def test_what_it_does_not_read():
    packed, _ = pack(*LAYOUT, 0, gaussian=True)
    x = torch.randn(2, 257)
    assert native.words_of(packed) and native.words_of(pack(*LAYOUT, 0)[0]) is None
    assert native.words_of(pack(*LAYOUT, 24, gaussian=True)[0]) is None  # no power of 2
    assert native.readable(x) and not native.readable(x.to_sparse())
    assert not native.readable(x.to("meta"))
    seen = []
    torch.func.vmap(lambda row: seen.append(native.readable(row)) or row)(x)
    assert seen == [False]
    apart = replace(packed, v=packed.v.T.contiguous().T)
    assert native.words_of(apart) is None
    found = ops.low_rank(x, *arguments(apart, False))
    assert relative(found, low_rank(x, packed).double()) < 1e-6


@pytest.mark.parametrize("part", ["v", "u", "ranks"])
def test_sizes_that_do_not_fit_are_refused_before_the_op(part):
    packed, _ = pack(*LAYOUT, 0, gaussian=True)
    short = replace(packed, **{part: getattr(packed, part)[:-1].clone()})
    with pytest.raises(ValueError, match=f"packed tensor {part} is .*its layout needs"):
        low_rank(torch.randn(1, 257), short)
    with pytest.raises(ValueError, match="needs"):
        low_rank(torch.randn(1, 257), replace(packed, n=2**40))


def test_inputs_that_do_not_fit_are_refused():
    packed, _ = pack(*LAYOUT, 0, gaussian=True)
    with pytest.raises(ValueError, match=r"\[2, 256\].*257"):
        low_rank(torch.randn(2, 256), packed)
    for index in -1, 130, 2**62:
        with pytest.raises(IndexError, match=r"outside 0\.\.129"):
            ops.low_rank_rows(torch.tensor([3, index]), *arguments(packed))


def test_factors_that_changed_are_read_anew():
    packed, _ = pack(*LAYOUT, 0, gaussian=True)
    other, delta = pack(*LAYOUT, 0, seed=1, gaussian=True)
    x = torch.randn(1, 257)
    before = low_rank(x, packed)
    for part, tensor in packed.tensors.items():
        tensor.copy_(other.tensors[part])
    assert relative(low_rank(x, packed), x.double() @ delta.T) < 1e-6
    moved = replace(packed, **{part: t.clone() for part, t in packed.tensors.items()})
    assert not torch.equal(low_rank(x, moved), before)
