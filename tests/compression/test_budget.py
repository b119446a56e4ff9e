"""Bytes promised and planned: what is fixed, what ranks get, budgets that are too small."""

from __future__ import annotations

import re

import pytest
import torch
from matrix_cases import METHODS, bytes_of_rank, compress_all, matrix, random_delta
from tiny_pairs import make_config

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.compression.budget import plan_budget, rank_options

SHAPES = {"a": (96, 64), "b": (64, 128), "c": (40, 40)}
OVERLAY = {"norm": (torch.float32, (64,)), "bias": (torch.bfloat16, (96,))}


@pytest.mark.parametrize("method", METHODS)
def test_planned_bytes(method):
    config = DeltaMixConfig("b", ratio=0.25, method=method)
    total, ranks = plan_budget(SHAPES, OVERLAY, [], config)
    elements = 96 * 64 + 64 * 128 + 40 * 40 + 64 + 96
    assert total == int(0.25 * 2 * elements)
    assert total - ranks > 64 * 4 + 96 * 2  # and the header


@pytest.mark.parametrize("method", METHODS)
def test_all_matrices_together_keep_the_budget(method):
    matrices = {
        name: matrix(random_delta(*shape, i)) for i, (name, shape) in enumerate(SHAPES.items())
    }
    config = DeltaMixConfig("b", ratio=0.25, method=method)
    _, budget = plan_budget(SHAPES, {}, [], config)
    results = compress_all(matrices, budget, config)
    assert results.keys() == matrices.keys()
    spent = sum(sum(r.packed.nbytes.values()) for r in results.values())
    cheapest = max(bytes_of_rank(*shape, 2, config) for shape in SHAPES.values())
    assert budget - cheapest < spent <= budget


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [(0, 2, 3, 4, 8), (0, 8), (1, 2)])
@pytest.mark.parametrize("overlay", [{}, OVERLAY])
def test_the_suggested_budget_works(method, bits, overlay):
    """Too small a budget names a ratio and a number of bytes; both must then be accepted."""
    options = {"method": method, "bits": bits}
    with pytest.raises(DeltaMixError, match="too small") as error:
        plan_budget(SHAPES, overlay, ["g:a"], make_config("b", budget_bytes=10, **options))
    message = str(error.value)
    ratio = float(re.search(r"ratio >= ([\d.]+)", message)[1])
    assert "\n" not in message
    enough = int(re.search(r"budget_bytes >= (\d+)", message)[1])
    for choice in ({"ratio": ratio}, {"budget_bytes": enough}):
        config = make_config("b", **choice, **options)
        _, budget = plan_budget(SHAPES, overlay, ["g:a"], config)
        matrices = {name: matrix(random_delta(*shape)) for name, shape in SHAPES.items()}
        results = compress_all(matrices, budget, config).values()
        assert any(result.packed is not None for result in results)
        spent = sum(sum(r.packed.nbytes.values()) for r in results if r.packed)
        assert spent <= budget
    with pytest.raises(DeltaMixError, match="too small"):
        too_few = make_config("b", budget_bytes=enough - 1, **options)
        plan_budget(SHAPES, overlay, ["g:a"], too_few)


def test_no_ratio_above_one_is_suggested():
    """float32 tensors stored whole take twice the bf16 bytes that a ratio is measured in."""
    overlay = {"table": (torch.float32, (1000, 40))}
    with pytest.raises(DeltaMixError, match="too small") as error:
        plan_budget({}, overlay, [], DeltaMixConfig("b", ratio=1))
    assert "ratio >=" not in str(error.value)
    enough = int(re.search(r"budget_bytes >= (\d+)", str(error.value))[1])
    plan_budget({}, overlay, [], DeltaMixConfig("b", budget_bytes=enough))


def test_an_overlay_alone_must_fit_too():
    with pytest.raises(DeltaMixError, match="too small"):
        plan_budget({}, OVERLAY, [], DeltaMixConfig("b", budget_bytes=10))


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_rank(method):
    config = DeltaMixConfig("b", method=method)
    choices, pairs = rank_options((96, 64), config.method.group_sizes(False), config)
    assert pairs[0] == (0, 0) and choices.cost[0] == 0
    assert float(choices.relative[0]) == config.method.drop_penalty
    for (v, u), error, price in zip(pairs[1:], choices.relative[1:], choices.cost[1:], strict=True):
        assert v and u and (config.method.split_widths or v == u) and 0 < float(error) < 1
        if v == u:
            assert int(price) == bytes_of_rank(96, 64, v, config)
    widest = max(range(len(pairs)), key=lambda i: pairs[i])
    assert choices.relative.argmin() == widest and choices.cost.argmax() == widest
