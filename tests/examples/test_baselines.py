"""Baselines of the quality benchmark: the papers' formulas, and every byte one of a file."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tiny_pairs import fine_tune, relative, token_ids
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from bench_quality import baselines_peer
from bench_quality.baselines import (
    METHODS,
    Result,
    approximated,
    distill_scales,
    matrix_budget,
    reference_bytes,
    size_report,
)

BUDGETED = [name for name, method in METHODS.items() if not method.fixed_size]
SIZE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def random_deltas(*shapes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Deltas of full rank whose spectrum falls as 1/i."""
    random = torch.Generator().manual_seed(seed)
    deltas = {}
    for i, (m, n) in enumerate(shapes):
        spectrum = 1 / torch.arange(1, min(m, n) + 1)
        left = torch.randn(m, len(spectrum), generator=random) * spectrum
        deltas[f"layer.{i}"] = 0.01 * left @ torch.randn(len(spectrum), n, generator=random)
    return deltas


def random_gram(n: int) -> torch.Tensor:
    """C of inputs with a few strong directions."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(4 * n, n, generator=random) / torch.arange(1, n + 1)
    x = x @ torch.randn(n, n, generator=random)
    return x.T @ x / len(x)


def metric_error(delta, approximation, gram) -> float:
    error = (delta - approximation).double()
    return float(torch.trace(error @ gram.double() @ error.T))


def compress(name, deltas, grams=None, budget=None) -> Result:
    budget = reference_bytes(deltas, {}) // 8 if budget is None else budget
    return METHODS[name].compress(deltas, grams or {}, budget)


def stored(name: str, delta: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays a file of this method would hold for one matrix; bfloat16 as uint16."""
    m, n = delta.shape
    if "low rank" in name:
        k = np.linalg.matrix_rank(found.astype(np.float64), rtol=1e-5)
        return {"u": np.zeros((m, k), np.uint16), "b": np.zeros((k, n), np.uint16)}
    if name == "BitDelta":
        scale = np.array([np.abs(delta).mean(dtype=np.float64)], np.float32)
        return {"signs": np.packbits(delta > 0), "scale": scale}
    if name == "DARE":
        return {"values": np.zeros(np.count_nonzero(found), np.uint16)}
    bits = int(name.removeprefix("int"))
    groups = -(-n // 128)
    return {
        "codes": np.packbits(np.zeros((m * n, bits), bool)),  # one column a bit
        "scales": np.zeros((m, groups), np.uint16),
        "zeros": np.packbits(np.zeros((m * groups, bits), bool)),
    }


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_an_explicit_file(name, tmp_path):
    deltas = random_deltas((96, 160), (64, 300), (65, 67))
    overlay = {"norm.weight": torch.ones(160), "head.bias": torch.ones(7, dtype=torch.bfloat16)}
    grams = {"layer.0": random_gram(160)}
    total = reference_bytes(deltas, overlay) // 8
    method = METHODS[name]
    result = method.compress(deltas, grams, matrix_budget(total, method, deltas, overlay))
    report = size_report(result, method, deltas, overlay)

    arrays = {}
    for module, delta in deltas.items():
        parts = stored(name, delta.numpy(), result.deltas[module].numpy())
        assert tuple(parts) == method.parts
        arrays |= {f"{module}.{part}": array for part, array in parts.items()}
    seed = 8 * (name == "DARE")
    assert result.total == sum(array.nbytes for array in arrays.values()) + seed
    arrays |= {"norm.weight": np.ones(160, np.float32), "head.bias": np.ones(7, np.uint16)}
    file = tmp_path / "delta.safetensors"
    save_file(arrays, file, metadata={"format": "pt"})
    on_disk = file.stat().st_size + seed
    assert on_disk <= report.total <= on_disk + 20 * len(arrays)  # the header's is a bound
    assert report.overlay == 160 * 4 + 7 * 2
    assert method.fixed_size or report.total <= total


@given(
    name=st.sampled_from(BUDGETED),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    budget=st.integers(8, 8000),
)
@settings(max_examples=60)
def test_budget_is_never_exceeded(name, shapes, budget):
    deltas = random_deltas(*shapes)
    result = compress(name, deltas, budget=budget)
    assert result.total <= budget
    assert {name: tuple(d.shape) for name, d in result.deltas.items()} == {
        name: tuple(d.shape) for name, d in deltas.items()
    }


@pytest.mark.parametrize("name", BUDGETED)
def test_budget_is_used_and_error_falls_with_bytes(name):
    deltas = random_deltas((96, 160), (128, 64), (160, 96))
    whole = reference_bytes(deltas, {})
    errors = []
    for share in (32, 16, 8, 4):
        result = compress(name, deltas, budget=whole // share)
        assert whole // share - result.total <= 2 * (128 + 64)  # the last matrix's rank
        errors.append(sum(float((deltas[n] - d).norm() ** 2) for n, d in result.deltas.items()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_more_bits_less_error():
    deltas = random_deltas((96, 300))
    delta, (two, four) = deltas["layer.0"], (compress(n, deltas) for n in ("int2", "int4"))
    assert relative(four.deltas["layer.0"], delta) < 0.4 * relative(two.deltas["layer.0"], delta)
    assert len(two.deltas["layer.0"][0, :128].unique()) <= 4
    assert 2.14 < 8 * two.total / delta.numel() < 2.2  # the third group of 300 is short
    assert 4.15 < 8 * four.total / delta.numel() <= 4.2


def test_low_rank_is_the_truncated_svd():
    deltas = random_deltas((96, 160))
    delta = deltas["layer.0"]
    u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
    found = compress("low rank", deltas, {"layer.0": random_gram(160)}, budget=2 * 12 * 256 + 100)
    assert found.payload == 2 * 12 * 256
    best = (u[:, :12] * sigma[:12]) @ v[:12]
    assert relative(found.deltas["layer.0"], best) < 2**-8  # bfloat16 factors


def test_whitening_is_best_in_the_metric_of_the_inputs():
    deltas, gram = random_deltas((96, 160)), random_gram(160)
    delta, grams = deltas["layer.0"], {"layer.0": gram}
    plain, whitened = (
        metric_error(delta, compress(name, deltas, grams).deltas["layer.0"], gram)
        for name in ("low rank", "whitened low rank")
    )
    assert whitened < 0.5 * plain
    # Eckart and Young: the error is what the spectrum of ΔW·L drops
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(160)
    spectrum = torch.linalg.svdvals(delta.double() @ torch.linalg.cholesky(damped))
    kept = compress("whitened low rank", deltas, grams).payload // (2 * 256)
    found = compress("whitened low rank", deltas, grams).deltas["layer.0"]
    expected = float((spectrum[kept:] ** 2).sum())
    assert metric_error(delta, found, damped) == pytest.approx(expected, rel=0.02)


def test_whitening_without_a_gram_is_plain():
    deltas = random_deltas((64, 48))
    both = [compress(name, deltas).deltas["layer.0"] for name in ("low rank", "whitened low rank")]
    assert torch.equal(*both)


def test_bitdelta_is_sign_times_mean_magnitude():
    delta = torch.tensor([[1.0, -3.0, 0.0], [0.5, -0.5, 1.0]])
    result = compress("BitDelta", {"a": delta})
    assert torch.equal(result.deltas["a"], torch.tensor([[1.0, -1, -1], [1, -1, 1]]))  # mean: 6 / 6
    assert (result.payload, result.scales) == (1, 4)


def test_dare_is_unbiased():
    deltas = random_deltas((24, 20), (10, 30))
    share, rounds = 0.25, 400
    budget = 8 + int(2 * share * 780)
    mean = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    for seed in range(rounds):
        result = METHODS["DARE"].compress(deltas, {}, budget, seed=seed)
        for name, found in result.deltas.items():
            mean[name] += found / rounds
    for name, delta in deltas.items():
        kept = result.deltas[name] != 0
        assert int(kept.sum()) == share * delta.numel()
        assert torch.allclose(result.deltas[name][kept], delta[kept] / share, rtol=2**-8)
        deviation = delta.abs() * ((1 / share - 1) / rounds) ** 0.5
        assert (mean[name] - delta).abs().div(deviation).max() < 4.5
        assert relative(mean[name], delta) < 1.2 * ((1 / share - 1) / rounds) ** 0.5


def test_dare_repeats_itself():
    deltas = random_deltas((24, 20))
    one, two = (compress("DARE", deltas).deltas["layer.0"] for _ in range(2))
    assert torch.equal(one, two)


def test_a_budget_below_the_overlay_is_refused():
    deltas, overlay = random_deltas((64, 64)), {"norm": torch.ones(4096)}
    with pytest.raises(ValueError, match="overlay and the header take"):
        matrix_budget(16_384, METHODS["DARE"], deltas, overlay)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_attention_heads=2, tie_word_embeddings=True))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SIZE, num_attention_heads=2, num_labels=5))


def tuned(build) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A fine-tune and the deltas of its matrices, the tied embedding once."""
    torch.manual_seed(0)
    model = build().eval()
    modules = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    names = [n for n, m in modules.items() if m.weight.ndim == 2 and n != "lm_head"]
    base = {name: modules[name].weight.detach().clone() for name in names}
    fine_tune(model)
    return model, {name: modules[name].weight.detach() - base[name] for name in names}


def distillation_batch() -> dict[str, torch.Tensor]:
    ids = token_ids(4, 16)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logit_error(model, deltas, result: Result) -> float:
    """Mean squared error of the logits of the real tokens."""
    batch = distillation_batch()
    wanted = model(**batch).logits
    with approximated(model, deltas, result):
        error = (model(**batch).logits - wanted).double().square()
    return float((error if error.ndim == 2 else error[batch["attention_mask"].bool()]).mean())


@pytest.mark.parametrize("build", [llama, bert])
def test_distillation_brings_the_logits_closer_and_leaves_the_teacher_alone(build):
    model, deltas = tuned(build)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{**distillation_batch(), "labels": torch.zeros(4, 16, dtype=torch.int64)}]
    start = compress("BitDelta", deltas)
    end = distill_scales(model, deltas, batches, steps=20, lr=2e-5)
    assert logit_error(model, deltas, end) < logit_error(model, deltas, start)
    assert end.total == start.total
    for name, delta in deltas.items():
        assert torch.equal(end.deltas[name] > 0, delta > 0)
        assert len(end.deltas[name].abs().unique()) == 1
        assert not torch.equal(end.deltas[name], start.deltas[name])
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("build", [llama, bert])
def test_distillation_goes_down_the_slope_of_every_scale(build):
    """Adam's first step is lr against the sign of the gradient, here taken by differences."""
    model, deltas = tuned(build)
    start = compress("BitDelta", deltas)
    end = distill_scales(model, deltas, [distillation_batch()], steps=1, lr=1e-5)
    slopes = {}
    for name, signed in start.deltas.items():
        errors = (
            logit_error(model, deltas, replace(start, deltas={**start.deltas, name: scaled}))
            for scaled in (1.05 * signed, 0.95 * signed)
        )
        slopes[name] = next(errors) - next(errors)
    steep = [n for n, slope in slopes.items() if abs(slope) > 0.02 * max(map(abs, slopes.values()))]
    assert len(steep) > 3
    for name in steep:
        step = float(end.deltas[name].abs().max() - start.deltas[name].abs().max())
        assert step == pytest.approx(-1e-5 if slopes[name] > 0 else 1e-5, rel=0.01)


def test_approximated_puts_the_base_plus_the_approximation():
    model, deltas = tuned(llama)
    own = model.model.embed_tokens.weight.detach().clone()
    nothing = Result({name: torch.zeros_like(delta) for name, delta in deltas.items()}, payload=0)
    with approximated(model, deltas, nothing):
        name = "model.embed_tokens"
        assert torch.allclose(model.lm_head.weight, own - deltas[name], atol=1e-6)  # tied
    assert torch.equal(model.lm_head.weight, own)


@pytest.mark.parametrize(
    ("strategy", "options"), [("quantized", {}), ("sparse", {"sparsity": 0.5}), ("int4", {})]
)
def test_the_peer_stores_and_restores_a_pair(strategy, options, pair, tmp_path):
    pytest.importorskip("deltatensors", reason=f"pip install {baselines_peer.PACKAGE}")
    folders = pair("bert")
    file = tmp_path / "delta.wdelta"
    restored, size = baselines_peer.deltatensors(
        folders.tuned, folders.base, file, strategy, **options
    )
    base, finetuned = (load_file(f / "model.safetensors") for f in (folders.base, folders.tuned))
    assert size == file.stat().st_size
    assert restored.keys() == finetuned.keys()
    change, error = (
        sum(float((other[name].float() - finetuned[name]).norm() ** 2) for name in finetuned)
        for other in (base, restored)
    )
    assert error < 0.6 * change


def test_the_peer_says_why_it_refuses_a_pair(pair, tmp_path):
    pytest.importorskip("deltatensors", reason=f"pip install {baselines_peer.PACKAGE}")
    folders = pair("bert_from_headless")
    with pytest.raises(baselines_peer.PeerSkipped, match=r"cannot store .*mismatch"):
        baselines_peer.deltatensors(folders.tuned, folders.base, tmp_path / "d", "int4")


def test_a_missing_peer_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deltatensors", None)
    with pytest.raises(baselines_peer.PeerSkipped, match="not installed: pip install"):
        baselines_peer.deltatensors(tmp_path, tmp_path, tmp_path / "d", "int4")
