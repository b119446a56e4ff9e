"""Settings in which a fine-tune differs from its base: told where they would be lost."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_pairs import DECODER, logits, relative
from transformers import AutoModelForCausalLM, LlamaConfig

from deltamix_hf.multi_delta.config_mismatch import differing

ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_differs_from_oneself(name, tmp_path):
    config = ARCHITECTURES[name].build().config
    config.save_pretrained(tmp_path)
    assert differing(config, json.loads((tmp_path / "config.json").read_text())) == {}


def test_what_differs_is_named():
    config = LlamaConfig(**DECODER)
    theirs = LlamaConfig(**{**DECODER, "rms_norm_eps": 1e-3}, rope_parameters=ROPE).to_dict()
    found = differing(config, theirs)
    assert found == {
        "rms_norm_eps": (1e-6, 1e-3),
        "rope_parameters.rope_theta": (10000.0, 500.0),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": 7, "pad_token_id": None, "bos_token_id": 9},
        {"architectures": ["Other"], "dtype": "bfloat16", "transformers_version": "5.0"},
        {"quantization_config": {"quant_method": "deltamix"}, "use_cache": False},
        {"_name_or_path": "elsewhere", "output_attentions": True},
    ],
)
def test_what_has_no_effect_is_not_named(change):
    assert differing(LlamaConfig(**DECODER), LlamaConfig(**DECODER).to_dict() | change) == {}


@pytest.mark.parametrize("theirs", [{}, {"model_type": "gpt2"}, {"model_type": []}])
def test_other_models_are_left_to_other_checks(theirs):
    assert differing(LlamaConfig(**DECODER), theirs) == {}


@pytest.mark.parametrize("value", [None, [], "many", {"rope_type": 3}])
def test_what_a_class_cannot_read_is_left_to_other_checks(value):
    theirs = LlamaConfig(**DECODER).to_dict() | {"rope_parameters": value, "hidden_size": value}
    assert isinstance(differing(LlamaConfig(**DECODER), theirs), dict)


def test_a_delta_with_another_rope_warns_beside_the_base(delta, copied):
    repo = delta("llama")
    folder = copied(repo.folder)
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": ROPE}
    (folder / "config.json").write_text(json.dumps(config))
    model = repo.pair.load(repo.pair.base)
    with pytest.warns(UserWarning, match="rope_parameters.rope_theta = 500.0, the base runs with"):
        model.load_delta(folder, "one")
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert relative(logits(alone), logits(model)) > 1e-3  # what is warned of
    assert torch.equal(logits(alone), logits(AutoModelForCausalLM.from_pretrained(folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_delta(repo.folder, "two")
