"""Texts end by the end tokens of each row's own delta; other settings are the base's, and told."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from many_deltas import NAMES, Family, loaded
from tiny_pairs import FAMILIES, make_tokenizer, text_of, token_ids
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EosTokenCriteria,
    GenerationConfig,
    pipeline,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta.end_tokens import RowEnds, read_ends

ROWS = ("one", None, "two", "three", "one")
PAD = 2


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in found.items() if v != "gone"}))


def written(model: Any, row: int, **options: Any) -> Tensor:
    """What a model writes to one row by itself, without what it is given."""
    plain = {"max_new_tokens": 12, "do_sample": False, **options}
    found = model.generate(token_ids(len(ROWS), 7)[row : row + 1], **plain)
    return found if model.config.is_encoder_decoder else found[:, 7:]


def _bart() -> BartForConditionalGeneration:
    """Its rows may have different deltas, unlike T5's, which share a table of positions."""
    size = {"layers": 1, "ffn_dim": 128, "attention_heads": 4}
    parts = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in size.items()}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}
    config = BartConfig(vocab_size=256, d_model=64, **parts, **special, forced_eos_token_id=None)
    return BartForConditionalGeneration(config)


@pytest.fixture(scope="module")
def ending(make_family, tmp_path_factory) -> Callable[[str], Family]:
    """Deltas that end by the third token they write and another: "three" by the base's."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = with_ends(make_family(name), tmp_path_factory.mktemp("ends"))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "bart", replace(FAMILIES["t5"], build=_bart))
        yield get


def with_ends(family: Family, folder: Path) -> Family:
    repos = {name: shutil.copytree(repo, folder / name) for name, repo in family.repos.items()}
    for number, name in enumerate(("one", "two")):
        model = family.pair.load(repos[name])
        free = written(model, ROWS.index(name), eos_token_id=None)[0]
        own = int(free[2 + number + model.config.is_encoder_decoder])
        edit(repos[name], "generation_config.json", eos_token_id=[5 + number, own])
    return Family(family.pair, repos)


@pytest.fixture(scope="module", params=["llama", "bart"])
def family(request, ending) -> Family:
    return ending(request.param)


@pytest.fixture
def llama(ending) -> Family:
    return ending("llama")


@pytest.fixture(scope="module")
def alone(family) -> dict[str | None, Any]:
    folders = {None: family.pair.base, **family.repos}
    return {name: family.pair.load(folder) for name, folder in folders.items()}


@pytest.fixture
def model(family):
    return loaded(family)


def check(model: Any, alone: dict[str | None, Any], **options: Any) -> list[int]:
    """Compare a mixed batch with each row alone, padded; the lengths of what was written."""
    ids, times = token_ids(len(ROWS), 7), options.get("num_return_sequences", 1)
    plain = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, **options}
    found = model.generate(ids, delta_names=list(ROWS), **plain)
    found = found if model.config.is_encoder_decoder else found[:, 7:]
    lengths = []
    for row, name in enumerate(ROWS):
        own = written(alone[name], row, pad_token_id=PAD, **options)
        mixed = found[row * times : (row + 1) * times]
        assert torch.equal(mixed[:, : own.shape[1]], own), name
        assert bool((mixed[:, own.shape[1] :] == PAD).all()), name
        lengths.append(own.shape[1])
    return lengths


def test_each_row_ends_as_alone(model, alone):
    lengths = check(model, alone)
    assert lengths[0] < 12 > lengths[2]  # both end early


@pytest.mark.untraced
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
        {"min_new_tokens": 5},
        {"min_length": 10},
        {"exponential_decay_length_penalty": (1, 1.5)},
        {"repetition_penalty": 1.2, "return_dict_in_generate": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_row_ends_as_alone_with(model, alone, options):
    check(model, alone, **options)


@pytest.mark.untraced
@pytest.mark.parametrize("name", [*NAMES, None])
def test_all_rows_of_one_delta(model, alone, name):
    model.set_delta(name)
    for row in range(2):
        assert torch.equal(written(model, row), written(alone[name], row))
    with model.disable_deltas():
        assert torch.equal(written(model, 0), written(alone[None], 0))
    with model.use_deltas(name or "__base__"):
        assert torch.equal(written(model, 0), written(alone[name], 0))


@pytest.mark.untraced
@pytest.mark.parametrize("how", ["None", "number", "config", "criteria"])
def test_what_the_caller_gives_wins(model, alone, how):
    third = int(written(alone["one"], 0, eos_token_id=None)[0, 5])
    options: dict[str, Any] = {
        "None": {"eos_token_id": None},
        "number": {"eos_token_id": third},
        "config": {"generation_config": GenerationConfig(eos_token_id=third)},
        "criteria": {"stopping_criteria": [EosTokenCriteria(third)]},
    }[how]
    model.set_delta("one")
    given = {"eos_token_id": None if how == "None" else third}
    assert torch.equal(written(model, 0, **options), written(alone["one"], 0, **given))


@pytest.mark.untraced
def test_a_config_with_the_base_s_ends_chooses_none(model, alone):
    """As pipelines of transformers up to 5.19 give one, a copy of the model's."""
    given = {"generation_config": GenerationConfig(**model.generation_config.to_diff_dict())}
    assert torch.equal(written(model, 0, **given), written(alone["one"], 0))


@pytest.mark.untraced
def test_pipelines(model, alone):
    if model.config.is_encoder_decoder:
        pytest.skip("no pipeline of this transformers takes it")
    options = {"max_new_tokens": 12, "do_sample": False, "return_tensors": True}
    for name, row in (("one", 0), ("two", 2)):
        text = text_of(token_ids(len(ROWS), 7)[row])
        beside = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
        own = pipeline("text-generation", model=alone[name], tokenizer=make_tokenizer())
        assert beside(text, delta_names=name, **options) == own(text, **options)


def test_continuous_batching(llama):
    folders = {None: llama.pair.base, **llama.repos}
    alone = {name: llama.pair.load(folder) for name, folder in folders.items()}
    model = loaded(llama)
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    ids = token_ids(len(ROWS), 7).tolist()
    options = {"continuous_batching_config": config, "max_new_tokens": 12}
    found = model.generate_batch(ids, delta_names=list(ROWS), **options)
    for row, (name, result) in enumerate(zip(ROWS, found.values(), strict=True)):
        assert result.generated_tokens == written(alone[name], row)[0].tolist(), name
    given = GenerationConfig(eos_token_id=255, max_new_tokens=12, do_sample=False)
    found = model.generate_batch(ids, given, delta_names=list(ROWS), **options)
    assert {len(result.generated_tokens) for result in found.values()} == {12}
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        own = manager.add_request(ids[0], max_new_tokens=12, delta_name="one")
        chosen = manager.add_request(ids[0], max_new_tokens=12, delta_name="one", eos_token_id=255)
        lengths = {
            r.request_id: len(r.generated_tokens)
            for r in (manager.get_result(timeout=60), manager.get_result(timeout=60))
        }
    assert lengths[own] == written(alone["one"], 0).shape[1] and lengths[chosen] == 12


def test_beside_a_delta_of_its_own(family, alone):
    model = family.pair.load(family.repos["one"])
    model.load_delta(family.repos["two"], "two")
    for name, own in (("default", "one"), ("__base__", None), ("two", "two")):
        row = ROWS.index(own)
        assert torch.equal(written(model, row, delta_names=name), written(alone[own], row)), name


@pytest.mark.untraced
@pytest.mark.parametrize("told", ["config.json", "nowhere", "no ends"])
def test_a_repo_without_the_file(llama, copied, told):
    """Then its config.json counts, as by itself, and if that says nothing, the base's ends."""
    repo = copied(llama.repos["one"])
    ends = json.loads((repo / "generation_config.json").read_text())["eos_token_id"]
    if told == "no ends":
        edit(repo, "generation_config.json", eos_token_id="gone")
    else:
        (repo / "generation_config.json").unlink()
        edit(repo, "config.json", eos_token_id=ends if told == "config.json" else "gone")
    model = llama.pair.load(llama.pair.base)
    model.load_delta(repo, "one")
    wanted = {"eos_token_id": None} if told == "no ends" else {}
    if told == "nowhere":
        wanted = {"eos_token_id": model.generation_config.eos_token_id}
    assert torch.equal(written(model, 0), written(llama.pair.load(llama.repos["one"]), 0, **wanted))


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [[1]], {"a": 1}, [2**40], [1] * 2000])
def test_what_is_no_token_is_refused(llama, copied, value):
    repo = copied(llama.repos["one"])
    edit(repo, "generation_config.json", eos_token_id=value)
    model = llama.pair.load(llama.pair.base)
    with pytest.raises(DeltaMixError, match="eos_token_id that is no token"):
        model.load_delta(repo, "one")
    assert model.list_deltas() == {} and read_ends([7, -1], "it") == [7]


def test_a_link_out_of_the_repo_is_refused(llama, copied, tmp_path):
    repo = copied(llama.repos["one"])
    shutil.move(repo / "generation_config.json", tmp_path / "elsewhere.json")
    (repo / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DeltaMixError, match=r"generation_config\.json .* outside its folder"):
        llama.pair.load(llama.pair.base).load_delta(repo, "one")


def test_tokens_end_their_own_rows_alone():
    ends = RowEnds.of([[3], [4, 5], []])
    own = ends.own(torch.tensor([[3, 4, 5]]), 6).int().tolist()
    assert own == [[1, 0, 0]] * 2 + [[0, 1, 1]] * 2 + [[0, 0, 0]] * 2
    assert RowEnds.of([[9, 4], [4]]) == [4, 9]  # what pads, if nothing else, ends most rows


def test_rows_that_are_none_of_those_named():
    with pytest.raises(DeltaMixError, match="2 rows were named, which end by different tokens"):
        RowEnds.of([[3], [4, 5]]).own(torch.zeros(3, 1, dtype=torch.long), 3)


def test_what_is_the_base_s_is_told_once(llama, copied):
    repo = copied(llama.repos["two"])
    edit(repo, "generation_config.json", do_sample=True, temperature=0.6, pad_token_id=9)
    edit(repo, "config.json", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    model = llama.pair.load(llama.pair.base)
    with pytest.warns(UserWarning) as told:
        model.load_delta(repo, "two")
    assert len(told) == 1
    text = str(told[0].message)
    for name in ("do_sample = True", "temperature = 0.6", "pad_token_id = 9", "id2label.0 = 'no'"):
        assert name in text
    assert "id2label.1" in text and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_delta(llama.repos["one"], "one")  # differs in its ends alone


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_told_unless_it_is_the_base_s(llama, copied, file):
    repo, base = copied(llama.repos["one"]), copied(llama.pair.base)
    text = json.dumps({"chat_template": "{{ m }}"}) if file.endswith(".json") else "{{ m }}"
    (repo / file).write_text(text)
    with pytest.warns(UserWarning, match="chat_template = '{{ m }}', the base runs with None"):
        llama.pair.load(base).load_delta(repo, "one")
    (base / file).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.pair.load(base).load_delta(repo, "one")
