"""Fine-tunes with more or fewer tokens than their base: added rows are stored, others cut off."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pairs import (
    FAMILIES,
    VOCAB,
    fine_tune,
    make_config,
    quick,
    relative,
    snapshot,
    token_ids,
    weight_bytes,
)
from tiny_pairs import logits as logits_of
from transformers import AutoModel

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.model_class import empty_model
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.evaluation.distance import measure

FILE = "model.safetensors"
MORE, FEWER = VOCAB + 5, VOCAB - 56
CASES = [("llama", MORE), ("llama_tied", MORE), ("llama_tied", FEWER), ("bert", MORE)]
CASES += [("t5", MORE), ("gpt2", FEWER), ("qwen3", FEWER)]


def logits(model):
    return logits_of(model, token_ids() % FEWER)


class Made:
    """A base, a fine-tune with `tokens` tokens, and its delta."""

    def __init__(self, folder, family, tokens, method="deltamix-kl", keep_old=False, **budget):
        self.family, self.tokens, self.folder = FAMILIES[family], tokens, folder
        torch.manual_seed(0)
        model = self.family.build().eval()
        model.save_pretrained(folder / "base")
        old = model.get_input_embeddings().weight.detach().clone()
        model.resize_token_embeddings(tokens, mean_resizing=False)
        if keep_old:
            with torch.no_grad():
                model.model.norm.weight += 0.1
        else:
            fine_tune(model)
        self.same_rows = torch.equal(model.get_input_embeddings().weight[: len(old)], old)
        model.save_pretrained(folder / "tuned")
        self.tuned_logits, self.rows = logits(model), model.get_input_embeddings().weight.detach()
        budget = budget or {"ratio": 0.35}
        config = make_config(folder / "base", method=method, **budget, **quick(method))
        self.packed = self.load("tuned", quantization_config=config)
        self.packed.save_pretrained(folder / "delta")

    def load(self, name, **options):
        return self.family.auto.from_pretrained(self.folder / name, **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def made(request, tmp_path_factory):
    return Made(tmp_path_factory.mktemp("resized"), *request.param)


@pytest.mark.untraced
def test_reload_gives_bit_equal_logits(made):
    assert torch.equal(logits(made.load("delta")), logits(made.packed))
    assert relative(logits(made.packed), made.tuned_logits) < 0.2
    assert logits(made.packed).shape[-1] == made.tokens


def test_added_rows_are_kept_and_counted(made):
    report = inspect_repo(made.folder / "delta")
    assert report.size.total == weight_bytes(made.folder / "delta")
    stored = load_file(made.folder / "delta" / FILE)
    tuned = made.load("tuned")
    differing = 2 * sum(p.numel() for p in tuned.parameters())
    assert report.size.reference == differing
    assert report.size.total <= 0.35 * differing
    added = {name: t for name, t in stored.items() if name.endswith("dm_rows")}
    assert bool(added) == (made.tokens > VOCAB)
    embeddings = made.load("delta").get_input_embeddings().weight
    assert embeddings.shape[0] == made.tokens
    if added:
        assert all(len(rows) == made.tokens - VOCAB for rows in added.values())
        assert relative(embeddings[VOCAB:], made.rows[VOCAB:]) < 0.005  # bfloat16


def test_saving_again_and_turning_dense(made, tmp_path):
    again = made.load("delta")
    again.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(made.folder / "delta")
    dense = made.load("delta", quantization_config=DeltaMixConfig(dequantize=True))
    assert relative(logits(dense), logits(made.packed)) < 1e-5
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(made.family.auto.from_pretrained(tmp_path / "dense")), logits(dense))


def test_it_verifies(made):
    report = inspect_repo(made.folder / "delta")
    assert sum(count for _, _, count in report.overlay.values()) == report.size.overlay
    assert [c.problem for c in verify_repo(str(made.folder / "delta")) if c.problem] == []


@pytest.mark.parametrize("method", ["deltamix", "delta-come"])
def test_the_published_methods_too(tmp_path, method):
    made = Made(tmp_path, "llama_tied", MORE, method)
    assert torch.equal(logits(made.load("delta")), logits(made.packed))


def test_only_new_rows(tmp_path):
    """The old rows are the base's: no packed matrix for them, the new ones stored all the same."""
    made = Made(tmp_path, "llama", MORE, keep_old=True, budget_bytes=20_000)
    assert made.same_rows
    assert torch.equal(logits(made.load("delta")), logits(made.packed))
    stored = load_file(tmp_path / "delta" / FILE)
    assert "model.embed_tokens.dm_rows" in stored and "model.embed_tokens.dm_v" not in stored


def test_it_cannot_run_beside_a_base_of_other_rows(made):
    model = made.load("base")
    before = logits(model)
    with pytest.raises(DeltaMixError, match="cannot run beside the base; load it by itself"):
        model.load_delta(made.folder / "delta", "one")
    assert torch.equal(logits(model), before)


ROWS = "model.embed_tokens.dm_rows"


def put(change):
    return lambda stored: stored.update({ROWS: change(stored[ROWS])})


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("longer"), "llama_tied", MORE, "delta-come")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(ROWS), "lacks"),
        (put(lambda t: t[:-1].contiguous()), "announces [[]5, 64[]]"),
        (put(lambda t: t.int()), "announces [[]5, 64[]]"),
        (put(lambda t: t * float("nan")), "NaN"),
    ],
    ids=["missing", "too few", "integers", "NaN"],
)
def test_damaged_rows_are_refused(longer, copied, change, message):
    folder = copied(longer.folder / "delta")
    stored = load_file(folder / FILE)
    change(stored)
    save_file(stored, folder / FILE, {"format": "pt"})
    with pytest.raises(DeltaMixError, match=message):
        longer.family.auto.from_pretrained(
            folder, quantization_config=DeltaMixConfig(verify_tensors=False)
        )


@pytest.mark.parametrize(
    "resized",
    [
        {},
        {"model.embed_tokens": [VOCAB, MORE + 1]},
        {"model.embed_tokens": [VOCAB - 1, MORE]},
        {"model.embed_tokens": [MORE, MORE]},
        {"model.embed_tokens": [VOCAB, MORE], "model.layers.0.mlp.up_proj": [64, 128]},
        {"model.other": [3, 4]},
        {"model.embed_tokens": "many"},
        {"model.embed_tokens": [0, MORE]},
    ],
)
def test_edited_numbers_of_rows_are_refused(longer, copied, resized):
    folder = copied(longer.folder / "delta")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["resized"] = resized
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError):
        longer.family.auto.from_pretrained(folder)


@pytest.mark.untraced
def test_distance_of_a_resized_fine_tune(made):
    files = [[str(made.folder / name / FILE)] for name in ("tuned", "base")]
    model = empty_model(str(made.folder / "tuned"))
    found = measure(model, *files, DeltaMixConfig(), [0.35])
    assert found.reference == inspect_repo(made.folder / "delta").size.reference
    assert 0 < found.budgets[0].lost < 0.3


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded(longer, tmp_path, place):
    parts = {"model.embed_tokens": place, "lm_head": place, "model.layers": "cpu"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = longer.load("delta", device_map=parts, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(longer.packed))


def test_a_class_without_the_head(made):
    """An untied head and its rows are left out, as its packed matrix is."""
    headless = AutoModel.from_pretrained(made.folder / "delta")
    expected = made.load("delta").base_model
    for name, tensor in headless.state_dict().items():
        if "pooler" not in name:  # which BERT's own class brings
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_inner_matrices_cannot_be_cut(longer, copied):
    """A narrower model over the same base, by an edited config.json."""
    folder = copied(longer.folder / "delta")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["resized"]["model.layers.0.mlp.up_proj"] = [128, 96]
    config["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError):
        longer.load(folder)
