"""Calibration: texts and token ids become batches; Grams of whole models, encoders among them.

What is measured beside Grams is in test_statistics.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pairs import make_tokenizer, text_of, token_ids
from torch import nn

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.calibration.data import (
    describe,
    no_text_given,
    random_tokens,
    stacked,
    token_batches,
)
from deltamix_hf.calibration.statistics import collect


def batches_of(calibration, **options):
    return token_batches(DeltaMixConfig("b", calibration=calibration, **options), make_tokenizer)


def no_tokenizer():
    raise AssertionError("the tokenizer was asked for")


def test_token_ids_need_no_tokenizer():
    ids = token_ids(5, 12).int()
    config = DeltaMixConfig("b", calibration=ids, num_samples=3, seq_length=10)
    batches = token_batches(config, no_tokenizer)
    assert torch.equal(torch.cat(batches), ids[:3, :10].long())
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert describe(config) == "token ids [3, 10]"


def test_long_token_tensors_are_split_into_small_batches():
    ids = token_ids(70, 100)
    batches = batches_of(ids)
    assert torch.equal(torch.cat(batches), ids)
    assert max(batch.numel() for batch in batches) <= 2048


def test_texts_are_tokenized_without_padding():
    texts = ["w4 w5 w6", "  ", "w7", ""]
    found = sorted(batch.tolist() for batch in batches_of(texts))
    assert found == [[[4, 5, 6]], [[7]]]


def test_texts_are_drawn_by_the_seed_and_cut():
    texts = [text_of(row) for row in token_ids(40, 12)]
    one, again = (batches_of(texts, num_samples=5, seq_length=8) for _ in range(2))
    other = batches_of(texts, num_samples=5, seq_length=8, seed=1)
    assert [b.shape for b in one] == [(5, 8)]  # equal lengths run together
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    cut = {tuple(row) for row in token_ids(40, 12)[:, :8].tolist()}
    assert {tuple(row) for row in one[0].tolist()} <= cut
    assert texts == [text_of(row) for row in token_ids(40, 12)]  # the caller's list is not shuffled


def test_texts_of_equal_length_share_a_batch():
    """Every text once, nothing padded, no batch above the limit, in an order of the seed."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (60,), generator=random).tolist() + [700] * 5 + [0, 0]
    rows = [token_ids(1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    batches = stacked(rows, seed=0)
    assert all(batch.dtype == torch.int64 and batch.numel() for batch in batches)
    assert max(batch.numel() for batch in batches) <= 2048
    found = [row for batch in batches for row in batch.tolist()]
    assert sorted(found) == sorted(row for row in rows if row)
    assert len(batches) <= 8 + 3  # a batch a length, and the long ones in three
    again, other = stacked(rows, seed=0), stacked(rows, seed=1)
    assert all(map(torch.equal, batches, again))
    assert [b.shape for b in batches] != [b.shape for b in other]
    with pytest.raises(DeltaMixError, match="no tokens"):
        stacked([[], []], seed=0)


def test_whether_the_user_gave_text():
    for data, given in ((None, False), ("self", False), (["a"], True), ("self.txt", True)):
        assert no_text_given(DeltaMixConfig("b", calibration=data)) is not given
    assert not no_text_given(DeltaMixConfig("b", calibration=torch.ones(2, 3, dtype=torch.long)))


def test_random_tokens():
    config = DeltaMixConfig("b", num_samples=70, seed=3)
    batches = random_tokens(50, config)
    ids = torch.cat(batches)
    assert ids.shape == (70, 128) and max(batch.numel() for batch in batches) <= 2048
    assert ids.dtype == torch.int64 and set(ids.unique().tolist()) == set(range(50))
    assert torch.equal(torch.cat(random_tokens(50, config)), ids)
    assert not torch.equal(torch.cat(random_tokens(50, DeltaMixConfig("b", num_samples=70))), ids)
    assert random_tokens(50, DeltaMixConfig("b", seq_length=10))[0].shape[1] == 10
    assert describe(config) == "weights alone"


def test_text_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("w4 w5\n\nw6 w7 w8\n", encoding="utf-8")
    found = sorted(batch.tolist() for batch in batches_of(str(file)))
    assert found == [[[4, 5]], [[6, 7, 8]]]
    assert str(file) in describe(DeltaMixConfig("b", calibration=str(file)))


def test_jsonl_file(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": "w4 w5"}, {"text": "w6", "more": 1}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert sorted(batch.tolist() for batch in batches_of(str(file))) == [[[4, 5]], [[6]]]


def test_line_separators_inside_a_text_do_not_end_it(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "w4\u2028w5"}, ensure_ascii=False), encoding="utf-8")
    assert [batch.tolist() for batch in batches_of(str(file))] == [[[4, 5]]]


def test_data_set_folder(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"text": "w4 w5"}, {"text": None}, {"text": "w6"}]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(batch.tolist() for batch in batches_of(str(tmp_path / "data"))) == [
        [[4, 5]],
        [[6]],
    ]


@pytest.mark.parametrize("content", ['{"prompt": "w4"}', "{not json", '"w4"', '{"text": 4}'])
def test_jsonl_without_texts(tmp_path, content):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "w4"}\n' + content)
    with pytest.raises(DeltaMixError, match=r"texts\.jsonl.*line 2"):
        batches_of(str(file))


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DeltaMixError, match=r"texts\.txt"):
        batches_of(str(tmp_path / "texts.txt"))


@pytest.mark.parametrize("name", ["no-such-file.txt", "someone/no-such-data", "w4 " * 2000])
def test_data_that_is_not_there(name):
    with pytest.raises(DeltaMixError) as error:
        batches_of(name)
    assert name[:40] in str(error.value)
    assert len(str(error.value)) < 1000


def test_data_set_without_a_text_column(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "w4"}\n')
    with pytest.raises(DeltaMixError, match="'text' column"):
        batches_of(str(tmp_path / "data"))


def test_no_tokens_left(tmp_path):
    (tmp_path / "blank.txt").write_text("\n  \n\n")
    with pytest.raises(DeltaMixError, match="no tokens"):
        batches_of(str(tmp_path / "blank.txt"))


def grams_of(model, modules, batches):
    """C = E[x·xᵀ] of every module that is called."""
    found, _ = collect(model, modules, batches, fisher=False)
    return {name: layer.inputs.mean() for name, layer in found.items()}


def test_grams_are_the_mean_outer_product_of_the_inputs(pair):
    """Against a plain float64 computation on the very inputs each module saw."""
    source = pair("llama")
    model = source.load(source.tuned)
    modules = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = list(token_ids(6, 16).split(2))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen[name].append(args[0]))
        for name, module in modules.items()
    ]
    grams = grams_of(model, modules, batches)
    for hook in hooks:
        hook.remove()
    assert grams.keys() == modules.keys()
    for name, gram in grams.items():
        x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen[name]]).double()
        assert len(x) == 6 * 16
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert torch.equal(gram, gram.T)
    attention = "model.layers.0.self_attn"
    assert torch.equal(grams[f"{attention}.q_proj"], grams[f"{attention}.k_proj"])
    found, _ = collect(model, modules, batches, fisher=False)
    assert found[f"{attention}.q_proj"].inputs is found[f"{attention}.k_proj"].inputs  # one copy
    assert found[f"{attention}.q_proj"].inputs is not found[f"{attention}.o_proj"].inputs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_grams_of_encoders_and_decoders(pair, name):
    source = pair(name)
    model = source.load(source.tuned)
    modules = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    grams = grams_of(model, modules, [token_ids()])
    assert grams.keys() == modules.keys()
    if name == "t5":  # cross-attention reads the encoder's output, in every layer
        keys = [f"decoder.block.{i}.layer.1.EncDecAttention.k" for i in range(2)]
        torch.testing.assert_close(grams[keys[0]], grams[keys[1]])
        own = "decoder.block.0.layer.0.SelfAttention.k"
        assert not torch.allclose(grams[keys[0]], grams[own])


@pytest.mark.parametrize("name", ["bert", "t5", "llama_tied"])
def test_gradients_reach_every_module(pair, name):
    """T5 has an embedding module for each side; positions of BERT are no input embeddings."""
    source = pair(name)
    model = source.load(source.tuned)
    modules = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    found, scored = collect(model, modules, [token_ids()], fisher=True)
    assert scored > 0 and found.keys() >= modules.keys() - {"shared"}
    for module_name, layer in found.items():
        gradient = layer.gradients.mean(scored)
        # queries of layers whose attention is uniform may get nearly nothing, but nothing is lost
        assert torch.isfinite(gradient).all() and gradient.diagonal().sum() > 0, module_name


def test_modules_that_are_not_called_have_no_gram(pair):
    source = pair("llama")
    model = source.load(source.tuned)
    spare = nn.Linear(4, 4)
    grams = grams_of(model, {"spare": spare, "lm_head": model.lm_head}, [token_ids()])
    assert grams.keys() == {"lm_head"}


def test_hooks_are_removed_if_the_model_fails(pair):
    source = pair("llama")
    model = source.load(source.tuned)
    with pytest.raises(IndexError):
        grams_of(model, {"lm_head": model.lm_head}, [torch.full((1, 4), 10**6)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_inputs_are_named(pair):
    source = pair("llama")
    model = source.load(source.tuned)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(DeltaMixError, match=name):
        grams_of(model, {name: model.get_submodule(name)}, [token_ids()])
