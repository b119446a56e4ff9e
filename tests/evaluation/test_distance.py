"""Distances against plain float64 figures, losses against what compression really loses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pairs import make_config

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.model_class import empty_model
from deltamix_hf.evaluation.distance import SAFE_LOSS, Distance, measure

FILE = "model.safetensors"
WEIGHTS_ALONE = {
    "fisher": False,
    "whiten": False,
    "delta_metric": 0.0,
    "sequential": False,
    "unbiased_gains": False,
    "tune_steps": 0,
    "drop_penalty": 1.0,
}


def distance(tuned, base, ratios=(1 / 4, 1 / 8)) -> Distance:
    model = empty_model(str(tuned))
    return measure(model, [str(tuned / FILE)], [str(base / FILE)], make_config(), ratios)


def test_figures_are_those_of_the_files(pair):
    source = pair("llama_tied")
    found = distance(source.tuned, source.base)
    tuned, base = load_file(source.tuned / FILE), load_file(source.base / FILE)
    assert len(found.matrices) == source.family.packed
    assert found.reference == sum(2 * t.numel() for t in tuned.values())  # everything was changed
    whole = {n for n, t in tuned.items() if t.numel() < 4096}  # norms and tiny matrices
    assert found.same == 0 and set(found.overlay) == whole
    squares = torch.zeros(2, dtype=torch.float64)
    for name, matrix in found.matrices.items():
        before = base[f"{name}.weight"].double()
        delta = tuned[f"{name}.weight"].double() - before
        sigma = torch.linalg.svdvals(delta)
        assert torch.allclose(matrix.energies, sigma**2, rtol=1e-4, atol=1e-12)
        share = (sigma**2).cumsum(0) / (sigma**2).sum()
        k = matrix.ranks_for_90
        assert share[k - 1] >= 0.9 and (k == 1 or share[k - 2] < 0.9)
        squares += torch.stack([delta.square().sum(), before.square().sum()])
    assert found.relative == pytest.approx(float(squares[0] / squares[1]) ** 0.5, rel=1e-5)


def test_types_are_names_without_numbers(pair):
    source = pair("llama_tied")
    groups = distance(source.tuned, source.base, ()).by_type()
    assert len(groups["model.layers.*.mlp.up_proj"]) == 2
    assert len(groups["model.embed_tokens"]) == 1


def test_loss_is_what_compression_from_the_weights_alone_loses(pair):
    source = pair("llama_tied")
    found = distance(source.tuned, source.base, [0.25])
    settings = source.compress(**WEIGHTS_ALONE).config.quantization_config
    energies = {name: matrix.delta for name, matrix in found.matrices.items()}
    lost = sum(settings.errors.get(name, 1.0) * energy for name, energy in energies.items())
    (budget,) = found.budgets
    assert budget.lost == pytest.approx(lost / sum(energies.values()), rel=0.25)
    assert budget.bytes == found.reference // 4


def test_more_bytes_lose_less_and_the_smallest_safe_budget_is_suggested(pair):
    source = pair("llama_tied")
    found = distance(source.tuned, source.base, [1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 100])
    assert found.budgets[-1].lost is None  # headers alone are more
    losses = [b.lost for b in found.budgets[:-1]]
    assert losses == sorted(losses) and losses[0] < SAFE_LOSS
    best = found.suggested
    assert best.lost == max(lost for lost in losses if lost <= SAFE_LOSS)


def test_identical_models(pair):
    source = pair("llama_tied")
    found = distance(source.base, source.base)
    assert not found.matrices and not found.overlay and found.relative == 0
    assert found.budgets == [] and found.suggested is None and found.reference == 0


def test_noise_of_full_rank_finds_no_safe_budget(pair, tmp_path):
    """A delta without few directions: nothing small is safe."""
    source = pair("llama_tied")
    random = torch.Generator().manual_seed(0)
    noisy = {
        name: t + 0.01 * torch.randn(t.shape, generator=random)
        for name, t in load_file(source.base / FILE).items()
    }
    save_file(noisy, tmp_path / FILE, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source.base / "config.json").read_bytes())
    assert distance(tmp_path, source.base, [1 / 4]).suggested is None


def test_another_base(pair, tmp_path):
    source = pair("llama_tied")
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in (
        (lambda t: t[:-1], "up_proj.weight is .* this is not the base"),
        (lambda t: t * float("nan"), "NaN"),
    ):
        weights = load_file(source.tuned / FILE)
        weights[name] = change(weights[name]).contiguous()
        save_file(weights, tmp_path / FILE)
        (tmp_path / "config.json").write_bytes((source.tuned / "config.json").read_bytes())
        with pytest.raises(DeltaMixError, match=message):
            distance(tmp_path, source.base)
    model = empty_model(str(source.tuned))
    save_file({"other": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(DeltaMixError, match="no tensor in common"):
        measure(model, [str(source.tuned / FILE)], [str(tmp_path / FILE)], DeltaMixConfig())
