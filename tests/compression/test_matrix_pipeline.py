"""The pipeline on single matrices: budgets kept, errors told truly, every corner of the input."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import (
    METHODS,
    Matrix,
    bytes_of_rank,
    compress_all,
    matrix,
    random_delta,
    true_error,
)
from tiny_pairs import make_config

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.compression.budget import plan_budget
from deltamix_hf.compression.matrix_pipeline import Compressed


def random_gram(n, seed=0) -> torch.Tensor:
    """Gram of inputs with a few strong directions, as hidden states have; float32."""
    random = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, n + 1) ** -0.5
    x = torch.randn(4 * n, n, generator=random) * strength @ torch.randn(n, n, generator=random)
    return x.T @ x / len(x)


def compress_matrix(single: Matrix, budget: int, config: DeltaMixConfig) -> Compressed:
    """One matrix with the whole budget; its metrics, if there are any, are those of a text."""
    if single[1].inputs is not None:
        config = copy.copy(config)
        config.calibration = ["some text"]
    return compress_all({"w": single}, budget, config)["w"]


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), [(96, 160), (160, 96), (65, 67)])
def test_bytes_stay_below_and_the_error_is_the_true_one(m, n, method, calibrated):
    delta = random_delta(m, n)
    gram, fisher = (random_gram(n), random_gram(m, 1)) if calibrated else (None, None)
    config = DeltaMixConfig("b", method=method)
    budget = 2 * m * n // 8
    result = compress_matrix(matrix(delta, gram, fisher), budget, config)
    spent = sum(result.packed.nbytes.values())
    # within the cheapest rank of the promise, as long as ranks are left
    assert budget - bytes_of_rank(m, n, 2, config) < spent <= budget
    assert result.packed.quantizer is config.method.quantizer
    assert result.error == pytest.approx(true_error(delta, result.packed.dense(), gram), rel=1e-5)
    assert result.error < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_more_bytes_lower_the_error(method):
    delta, gram = random_delta(96, 128, decay=0.5), random_gram(128)
    config = DeltaMixConfig("b", method=method)
    errors = [
        compress_matrix(matrix(delta, gram), 2 * 96 * 128 // share, config).error
        for share in (64, 16, 4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_the_better_method_is_better_on_correlated_inputs():
    delta, gram = random_delta(96, 128, decay=0.5), random_gram(128)
    errors = {
        method: compress_matrix(matrix(delta, gram), 1500, DeltaMixConfig("b", method=method)).error
        for method in METHODS
    }
    assert errors["deltamix"] < 0.8 * errors["delta-come"]
    assert errors["deltamix-kl"] < 0.8 * errors["deltamix"]


@pytest.mark.parametrize("method", ["deltamix", "deltamix-kl"])
def test_calibration_lowers_the_error_on_its_inputs(method):
    delta, gram = random_delta(96, 128, decay=0.5), random_gram(128)
    config = DeltaMixConfig("b", method=method)
    told = compress_matrix(matrix(delta, gram), 1500, config)
    blind = compress_matrix(matrix(delta), 1500, config)
    assert told.error < 0.95 * true_error(delta, blind.packed.dense(), gram)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(0, 5),
    method=st.sampled_from(METHODS),
    group_size=st.sampled_from([0, 8, 128]),
    budget=st.integers(0, 3000),
    calibrated=st.booleans(),
    widths=st.sets(st.integers(0, 8), min_size=1).filter(any).map(sorted),
)
@settings(max_examples=60)
def test_any_matrix_and_any_budget(m, n, rank, method, group_size, budget, calibrated, widths):
    """Tiny, thin, rank-deficient and zero deltas; budgets from nothing to plenty."""
    random = torch.Generator().manual_seed(m * 41 + n)
    delta = torch.randn(m, rank, generator=random) @ torch.randn(rank, n, generator=random)
    gram, fisher = (random_gram(n), random_gram(m, 1)) if calibrated else (None, None)
    config = make_config("b", method=method, group_size=group_size, bits=widths)
    result = compress_matrix(matrix(delta, gram, fisher), budget, config)
    if result.packed is None:
        assert result.error == (0.0 if not delta.any() else pytest.approx(1.0))
        return
    assert sum(result.packed.nbytes.values()) <= budget
    allowed = {2, 3, 8} if method == "delta-come" else set(widths)
    assert {b for _, *pair in result.packed.runs for b in pair} <= allowed
    assert method == "deltamix-kl" or all(v == u for _, v, u in result.packed.runs)
    # atol: a rank-deficient delta can be met to float32 rounding
    expected = true_error(delta, result.packed.dense(), gram)
    assert result.error == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("method", ["deltamix", "deltamix-kl"])
def test_all_ranks_at_8_bit_are_nearly_exact(method):
    delta = random_delta(40, 30)
    config = make_config("b", method=method, group_size=8)
    result = compress_matrix(matrix(delta), 10**6, config)
    assert result.packed.rank == 30 and result.error < 1e-4
    assert sum(result.packed.nbytes.values()) <= 30 * bytes_of_rank(40, 30, 8, config)


def test_bands_of_delta_come():
    delta = random_delta(80, 90, decay=0.3)
    result = compress_matrix(matrix(delta), 10**6, DeltaMixConfig("b", method="delta-come"))
    assert result.packed.runs == [(2, 8, 8), (32, 3, 3), (46, 2, 2)]


def test_f_max_limits_the_distinct_widths():
    delta = random_delta(96, 128)
    for limit in (2, 3):  # 0 bit counts as one
        config = DeltaMixConfig("b", method="deltamix", f_max=limit)
        result = compress_matrix(matrix(delta), 2000, config)
        dropped = result.packed.rank < 96
        assert len(result.packed.runs) + dropped <= limit


def test_a_delta_says_without_data_which_inputs_it_was_trained_on():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 96, generator=random) @ torch.randn(96, 96, generator=random)
    inputs *= torch.logspace(0, -1, 96)
    delta = torch.randn(64, 400, generator=random) @ inputs / 1e4
    gram, errors = inputs.T @ inputs / len(inputs), {}
    for share in (0.0, 0.3):
        config = make_config("b", delta_metric=share)
        packed = compress_matrix(matrix(delta), 2 * 64 * 96 // 8, config).packed
        errors[share] = true_error(delta, packed.dense(), gram)
    assert errors[0.3] < 0.7 * errors[0.0]
    for share in (0.0, 0.3):  # with text, what it says counts alone
        config = make_config("b", delta_metric=share)
        errors[share] = compress_matrix(matrix(delta, gram), 64 * 96 // 8, config).error
    assert errors[0.3] == errors[0.0]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_deterministic(method):
    delta, gram = random_delta(96, 128), random_gram(128)
    one, two = (
        compress_matrix(
            matrix(delta.clone(), gram.clone()), 1500, DeltaMixConfig("b", method=method)
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, one.packed.tensors.values(), two.packed.tensors.values()))


@pytest.mark.parametrize("method", ["deltamix", "deltamix-kl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["delta", "gram"])
def test_values_that_are_not_finite_are_named(where, value, method):
    delta, gram = random_delta(96, 64), random_gram(64)
    (delta if where == "delta" else gram)[3, 4] = value
    matrices = {"fine": matrix(random_delta(96, 64)), "layer.7": matrix(delta, gram)}
    shapes = dict.fromkeys(matrices, (96, 64))
    config = DeltaMixConfig("b", ratio=0.25, method=method)
    with pytest.raises(DeltaMixError, match=r"layer\.7: .*(NaN|infinity)"):
        compress_all(matrices, plan_budget(shapes, {}, [], config)[1], config)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        *(("deltamix", scale) for scale in (1e-30, 1e-12, 1e6)),
        # a Gaussian scale is at least 1e-30, which stands for a group of zeros
        *(("deltamix-kl", scale) for scale in (1e-25, 1e-12, 1e6)),
    ],
)
def test_any_scale_of_the_delta(method, scale):
    delta, config = random_delta(48, 64), DeltaMixConfig("b", method=method)
    plain = compress_matrix(matrix(delta), 1000, config).error
    scaled = compress_matrix(matrix(delta * scale), 1000, config).error
    assert scaled == pytest.approx(plain, rel=0.05)
