"""Second moments against explicit sums, and what the pipeline asks of a metric."""

from __future__ import annotations

import pytest
import torch

from deltamix_hf.linalg import second_moments as module
from deltamix_hf.linalg.second_moments import (
    FULL,
    LowRank,
    SecondMoment,
    blended,
    damped,
    dense,
    diagonal,
    energies,
    product,
    root,
    shrunk,
    times,
    unwhiten,
    unwhiten_left,
    whiten,
    whiten_left,
)

DIM = 24


def rows_of(count, dim=DIM, seed=0):
    """Correlated rows whose features differ by an order of magnitude."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=random)
    return torch.randn(count, dim, generator=random) @ mix * torch.logspace(0, -1, dim)


def moment_of(rows, **sizes):
    moment = SecondMoment(rows.shape[1], **sizes)
    for batch in rows.split([7, len(rows) - 7]):
        moment.add(batch.unflatten(0, (1, -1)))  # [1, tokens, d], as layers give it
    return moment


def explicit(rows):
    rows = rows.double()
    return rows.T @ rows / len(rows)


KINDS = {
    "full": {"full": DIM},
    "sketch": {"full": 8, "sketch": 16, "diagonal": DIM},
    "diagonal": {"full": 8, "diagonal": 16},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [module._ADDED, 5 * DIM + 1, 1])
def test_against_the_explicit_sum(kind, at_once, monkeypatch):
    monkeypatch.setattr(module, "_ADDED", at_once)
    rows = rows_of(200)
    moment = moment_of(rows, **KINDS[kind])
    assert moment.kind == kind and moment.count == 200
    found, wanted = dense(moment.mean()).double(), explicit(rows)
    if kind == "diagonal":
        found, wanted = found.diag(), wanted.diagonal().diag()
    if kind == "sketch":
        found, wanted = found.diagonal(), wanted.diagonal()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense(moment.mean(50)), dense(moment.mean()) * 4)
    with pytest.raises(ValueError, match="nothing was accumulated"):
        SecondMoment(DIM, **KINDS[kind]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind):
    moment = moment_of(rows_of(30), **KINDS[kind])
    kept = {"full": DIM * DIM, "sketch": (16 + 1) * DIM, "diagonal": DIM}[kind]
    assert moment.nbytes == 4 * kept
    assert moment.total is not None and moment.total.shape == (kept // DIM - (kind != "full"), DIM)


def test_the_sizes_at_which_the_kind_changes():
    kinds = {dim: SecondMoment(dim).kind for dim in (6144, 6145, 32768, 32769)}
    assert list(kinds.values()) == ["full", "sketch", "sketch", "diagonal"]
    assert SecondMoment(14336).nbytes == 4 * (2048 + 1) * 14336


def with_its_diagonal(matrix):
    """Half the matrix, half its diagonal: what a sketch stands for."""
    return (matrix + matrix.diagonal().diag()) / 2


def test_a_sketch_of_few_rows_is_exact():
    rows = rows_of(16)
    found = dense(moment_of(rows, **KINDS["sketch"]).mean())
    wanted = with_its_diagonal(explicit(rows))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_sketch_is_positive_and_right_on_average():
    rows = rows_of(64)
    wanted = with_its_diagonal(explicit(rows))
    mean = torch.zeros_like(wanted)
    for draw in range(200):
        moment = SecondMoment(DIM, full=8, sketch=48, diagonal=DIM)
        moment._random.manual_seed(draw)
        moment.add(rows)
        found = dense(moment.mean()).double()
        torch.testing.assert_close(found.diagonal(), wanted.diagonal(), rtol=1e-5, atol=0)
        assert torch.linalg.eigvalsh(found).min() > -1e-6 * found.trace()
        mean += found / 200
    # The rescaling to the exact diagonal biases off-diagonal entries by a few percent.
    assert (mean - wanted).norm() < 0.05 * wanted.norm()


def test_low_precision_rows_are_added_in_float32():
    rows = rows_of(4000).bfloat16()
    torch.testing.assert_close(
        moment_of(rows).mean().double(), explicit(rows), rtol=1e-4, atol=1e-5
    )


def metrics():
    full = explicit(rows_of(100)).float()
    low = LowRank(torch.rand(DIM, generator=torch.Generator().manual_seed(4)) + 0.1, rows_of(6))
    return {"matrix": full, "low rank": low, "diagonal": full.diagonal().clone(), "identity": None}


def matrix_of(metric):
    """The same as one matrix."""
    if metric is None:
        return torch.eye(DIM)
    found = dense(metric)
    return found.diag() if found.dim() == 1 else found


@pytest.mark.parametrize("kind", metrics())
@pytest.mark.parametrize("at_once", [module._MULTIPLIED, 7])
def test_what_a_metric_does(kind, at_once, monkeypatch):
    monkeypatch.setattr(module, "_MULTIPLIED", at_once)
    metric, rows = metrics()[kind], rows_of(5, seed=1)
    matrix = matrix_of(metric)
    torch.testing.assert_close(times(rows, metric), rows @ matrix, rtol=1e-4, atol=1e-4)
    if metric is not None:
        torch.testing.assert_close(diagonal(metric), matrix.diagonal())
    other = rows_of(7, seed=5).T.contiguous()
    crossed = product(rows.T.contiguous(), metric, other)
    torch.testing.assert_close(crossed, rows @ matrix @ other, rtol=1e-4, atol=1e-3)
    wanted = ((rows.double() @ matrix.double()) * rows).sum(1)
    found = energies(rows, metric)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    factor = root(metric)
    image = whiten(rows, factor)
    assert image.dtype == rows.dtype
    torch.testing.assert_close(image.square().sum(1).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unwhiten(image, factor), rows, rtol=1e-3, atol=1e-4)
    columns = rows.T.contiguous()
    image = whiten_left(columns.clone(), factor)
    torch.testing.assert_close(image.square().sum(0).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unwhiten_left(image.clone(), factor), columns, rtol=1e-3, atol=1e-4)
    lower = whiten(torch.eye(DIM), factor).double()
    torch.testing.assert_close(lower @ lower.T, matrix.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", metrics())
def test_damping(kind):
    metric = metrics()[kind]
    found = damped(metric, 0.1)
    if metric is None:
        assert found is None
        return
    before = matrix_of(metric).clone()
    wanted = before + 0.1 * before.diagonal().mean() * torch.eye(DIM)
    torch.testing.assert_close(matrix_of(found), wanted)
    assert torch.equal(matrix_of(metric), before)


@pytest.mark.parametrize("kind", list(metrics()))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shrinking_toward_the_mean(kind, share):
    metric = metrics()[kind]
    found = shrunk(metric, share)
    if metric is None:
        assert found is None
        return
    before = matrix_of(metric).clone()
    expected = (1 - share) * before + share * before.diagonal().mean() * torch.eye(DIM)
    torch.testing.assert_close(matrix_of(found), expected)
    assert torch.equal(matrix_of(metric), before)


def test_blending_a_sketch():
    metric, rows = metrics()["low rank"], rows_of(4, seed=1).T  # [DIM, 4]
    known, gram = matrix_of(metric), rows @ rows.T
    gram *= 0.25 * known.diagonal().mean() / gram.diagonal().mean()
    torch.testing.assert_close(matrix_of(blended(metric, rows, 0.25)), 0.75 * known + gram)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "matrix"])
def test_blending_with_the_second_moments_of_rows(kind):
    rows = rows_of(50, 5, seed=1).T  # [5, 50]
    metric = {"identity": None, "diagonal": torch.arange(1.0, 6), "matrix": explicit(rows_of(9, 5))}
    metric = metric[kind] if kind != "matrix" else metric[kind].float()
    before = None if metric is None else metric.clone()
    known = torch.eye(5) if metric is None else metric if kind == "matrix" else metric.diag()
    gram = rows @ rows.T
    gram = 0.25 * gram * known.diagonal().mean() / gram.diagonal().mean()
    expected = 0.75 * known + (gram.diagonal().diag() if kind == "diagonal" else gram)
    found = blended(metric, rows, 0.25)
    assert torch.allclose(found.diag() if found.dim() == 1 else found, expected, rtol=1e-4)
    assert before is None or torch.equal(metric, before)
    assert torch.isfinite(blended(metric, torch.zeros(5, 3), 0.25)).all()


def test_blending_a_long_identity_is_a_diagonal():
    assert blended(None, torch.ones(FULL + 1, 2), 0.5).shape == (FULL + 1,)


def test_a_metric_must_be_positive():
    with pytest.raises(ValueError, match="not positive definite"):
        root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_unseen_features_keep_their_values():
    """A feature that was always 0 has no energy, and whitening must stay invertible."""
    rows = rows_of(50)
    rows[:, 3] = 0
    factor, probe = root(moment_of(rows).mean()), rows_of(4, seed=2)
    torch.testing.assert_close(unwhiten(whiten(probe, factor), factor), probe, rtol=1e-3, atol=1e-3)


def merged(parts, seeds, *limits):
    moments = [SecondMoment(DIM, *limits, seed=seed) for seed in seeds]
    for moment, rows in zip(moments, parts, strict=True):
        moment.add(rows)
    first, *others = (SecondMoment.restored(*moment.state()) for moment in moments)
    for other in others:
        first.merge(other)
    return first


@pytest.mark.parametrize("limits", [(DIM, 8, 100), (8, 8, 16), (8, 8, 100)])
def test_merged_moments_are_those_of_all_rows(limits):
    rows = rows_of(64) + rows_of(1, seed=1)
    found, whole = merged(rows.split(32), (0, 1), *limits), merged([rows], [0], *limits)
    assert found.count == whole.count == 64
    torch.testing.assert_close(diagonal(found.mean()), diagonal(whole.mean()))
    if whole.kind != "sketch":
        torch.testing.assert_close(found.mean(), whole.mean())


def test_merged_sketches_have_signs_of_their_own():
    """Else rows in one slot would always be added, and their products would not average out."""
    rows = rows_of(64) + rows_of(1, seed=1)
    exact = rows.T @ rows
    errors = []
    for step in (1, 0):
        pairs = [(2 * i, 2 * i + step) for i in range(400)]
        totals = [merged(rows.split(32), pair, 8, 8, 100).total for pair in pairs]
        errors.append(float((sum(t.T @ t for t in totals) / len(pairs) - exact).norm()))
    assert errors[0] < 0.1 * exact.norm() < 0.5 * exact.norm() < errors[1]
