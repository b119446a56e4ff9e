"""DeltaMixConfig: what it accepts, what it refuses, what it writes to config.json."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pairs import make_config
from transformers.quantizers.auto import AutoQuantizationConfig

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.config import FORMAT_VERSION, overlay_dtype
from deltamix_hf.method import ALLOCATIONS, DEFAULT_METHOD, METHODS, SWITCHES
from deltamix_hf.quantization.quantizer import QUANTIZERS

budgets = st.one_of(
    st.just({}),
    st.floats(1e-6, 1).map(lambda x: {"ratio": x}),
    st.floats(1e-3, 16).map(lambda x: {"bits_per_weight": x}),
    st.integers(1, 2**40).map(lambda x: {"budget_bytes": x}),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "base_model": st.text(min_size=1),
        "base_revision": st.text(min_size=1),
        "calibration": st.text(min_size=1),
        "num_samples": st.integers(1, 10**6),
        "seq_length": st.integers(1, 10**6),
        "seed": st.integers(0, 2**63),
        "modules_to_not_convert": st.lists(st.text(min_size=1)),
        "calibration_source": st.text(min_size=1),
        "base_fingerprints": st.dictionaries(st.text(), st.text()),
        "errors": st.dictionaries(st.text(), st.floats(0, 1)),
    },
)


switches = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(list(METHODS)),
        "bits": st.sets(st.integers(0, 8)).filter(any).map(sorted).map(tuple),
        "allocation": st.sampled_from(ALLOCATIONS),
        "codebook": st.sampled_from(list(QUANTIZERS)),
        "group_size": st.integers(0, 4096),
        "embedding_group_size": st.sampled_from([0, 16, 128, 2**15]),
        "drop_penalty": st.floats(1, 1e6) | st.integers(1, 9),
        "delta_metric": st.floats(0, 1) | st.integers(0, 1),
        "prior": st.floats(0, 9) | st.integers(0, 9),
        "tune_steps": st.integers(0, 999),
        "f_max": st.integers(1, 9),
        **{
            name: st.booleans()
            for name, value in vars(METHODS[DEFAULT_METHOD]).items()
            if isinstance(value, bool)
        },
    },
)


def possible(chosen: dict) -> dict:
    """Without what its allocation has not."""
    method = METHODS[chosen.get("method", DEFAULT_METHOD)]
    allocation = chosen.get("allocation", method.allocation)
    if allocation != "global":
        chosen["split_widths"] = False
    if allocation != "matrix":
        chosen.pop("f_max", None)
    if allocation == "bands":
        chosen["codebook"] = "min-max"
    return chosen


@given(options, switches.map(possible), budgets)
def test_round_trip_through_json(given_options, chosen, budget):
    config = make_config(given_options.pop("base_model", None), **given_options, **chosen, **budget)
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = DeltaMixConfig.from_dict(stored)
    assert again.to_dict() == config.to_dict()
    assert again.method == config.method
    for name, value in (given_options | chosen | budget).items():
        holder = again.method if name in SWITCHES else again
        assert getattr(holder, name) == (again.method if name == "method" else value)
    assert stored.keys() >= set(SWITCHES)  # readers need not know the named methods
    assert again.budget(10**9) == config.budget(10**9)


def test_transformers_finds_the_class_by_quant_method():
    config = AutoQuantizationConfig.from_dict(DeltaMixConfig(base_model="b").to_dict())
    assert type(config) is DeltaMixConfig


def test_written_json_file_reads_back(tmp_path):
    config = make_config("b", ratio=0.125, bits=(0, 2, 8))
    config.to_json_file(tmp_path / "quantization.json")
    stored = json.loads((tmp_path / "quantization.json").read_text())
    assert DeltaMixConfig.from_dict(stored).to_dict() == config.to_dict()


def test_what_is_never_written():
    token_ids = DeltaMixConfig("b", calibration=torch.ones(2, 3, dtype=torch.int64))
    texts = DeltaMixConfig("b", calibration=["secret text"], base_kwargs={"token": "hf_secret"})
    assert "calibration" not in token_ids.to_dict()
    for shown in (json.dumps(texts.to_dict()), repr(texts), texts.to_json_string()):
        assert "secret" not in shown
    assert (
        DeltaMixConfig("b", calibration="some/dataset").to_dict()["calibration"] == "some/dataset"
    )


def test_repr_leaves_out_the_long_records():
    config = DeltaMixConfig("b", base_fingerprints={"w": "f00d"}, errors={"m": 0.25})
    assert "f00d" not in repr(config) and "errors" not in repr(config)
    assert '"base_model": "b"' in repr(config)


def test_paths_become_strings(tmp_path):
    assert DeltaMixConfig(tmp_path / "base").base_model == str(tmp_path / "base")


def test_deep_copy_is_equal_and_separate():
    config = DeltaMixConfig("b", errors={"m": 0.5})
    other = copy.deepcopy(config)
    other.errors["m"] = 1.0
    assert config.errors == {"m": 0.5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1000),  # 1/16
        ({"ratio": 0.5}, 8000),
        ({"ratio": 1}, 16000),
        ({"bits_per_weight": 2}, 2000),
        ({"budget_bytes": 777}, 777),
        ({"budget_bytes": 777.0}, 777),
    ],
)
def test_budget_in_bytes(options, expected):
    assert DeltaMixConfig("b", **options).budget(16000) == expected


def test_loading_attributes_are_what_the_user_gave():
    assert DeltaMixConfig(dequantize=True).get_loading_attributes() == {
        "dequantize": True,
        "base_kwargs": {},
        "verify_tensors": True,
    }
    moved = DeltaMixConfig("elsewhere", base_revision="r1", base_kwargs={"token": "t"})
    assert moved.get_loading_attributes() == {
        "dequantize": False,
        "base_kwargs": {"token": "t"},
        "verify_tensors": True,
        "base_model": "elsewhere",
        "base_revision": "r1",
        "base_given": True,
    }


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"method": "bitdelta"}, "'bitdelta'"),
        ({"method": None}, "method"),
        ({"method": ["deltamix"]}, "['deltamix']"),
        ({"ratio": 0.1, "budget_bytes": 100}, "ratio and budget_bytes"),
        ({"ratio": 0.1, "bits_per_weight": 1, "budget_bytes": 9}, "give only one"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": -0.5}, "-0.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": float("inf")}, "ratio is inf"),
        ({"ratio": 1.5}, "at most 1"),
        ({"ratio": "1/16"}, "'1/16'"),
        ({"ratio": True}, "ratio is True"),
        ({"bits_per_weight": 0}, "bits_per_weight"),
        ({"bits_per_weight": float("inf")}, "bits_per_weight"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight"),
        ({"bits_per_weight": 64}, "bits_per_weight"),
        ({"budget_bytes": 0}, "budget_bytes"),
        ({"budget_bytes": 10.5}, "whole number"),
        ({"budget_bytes": float("inf")}, "budget_bytes"),
        ({"bits": ()}, "bits is ()"),
        ({"bits": (0,)}, "at least one above 0"),
        ({"bits": (2, 9)}, "9"),
        ({"bits": (2, -1)}, "-1"),
        ({"bits": (2, 2.5)}, "2.5"),
        ({"bits": (True, 2)}, "True"),
        ({"bits": "23"}, "'23'"),
        ({"bits": 4}, "bits is 4"),
        ({"bits": (2, None)}, "None"),
        ({"f_max": 0}, "f_max"),
        ({"f_max": 2}, "allocation='matrix', this is 'global'"),
        ({"f_max": 2.0}, "f_max"),
        ({"group_size": -1}, "group_size"),
        ({"group_size": 64.0}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": "128"}, "group_size"),
        ({"embedding_group_size": 100}, "embedding_group_size"),
        ({"embedding_group_size": 8}, "embedding_group_size"),
        ({"embedding_group_size": 2**16}, "embedding_group_size"),
        ({"embedding_group_size": -1}, "embedding_group_size"),
        *(
            ({name: value}, f"{name} is {value!r}")
            for name, switch in vars(METHODS[DEFAULT_METHOD]).items()
            if isinstance(switch, bool)
            for value in (1, 0, "yes", [])
        ),
        ({"allocation": "layer"}, "allocation is 'layer'"),
        ({"allocation": ["global"]}, "allocation is ['global']"),
        ({"allocation": True}, "allocation is True"),
        ({"codebook": "lloyd"}, "codebook is 'lloyd'"),
        ({"codebook": 0}, "codebook is 0"),
        ({"drop_penalty": 0.99}, "drop_penalty is 0.99"),
        ({"drop_penalty": -4}, "drop_penalty is -4"),
        ({"drop_penalty": float("nan")}, "drop_penalty is nan"),
        ({"drop_penalty": float("inf")}, "drop_penalty is inf"),
        ({"drop_penalty": True}, "drop_penalty is True"),
        ({"drop_penalty": "4"}, "drop_penalty is '4'"),
        ({"prior": -1}, "prior is -1"),
        ({"prior": float("inf")}, "prior is inf"),
        ({"delta_metric": -0.1}, "delta_metric is -0.1"),
        ({"delta_metric": 1.5}, "delta_metric is 1.5"),
        ({"delta_metric": float("nan")}, "delta_metric is nan"),
        ({"delta_metric": True}, "delta_metric is True"),
        ({"delta_metric": "all"}, "delta_metric is 'all'"),
        ({"tune_steps": -1}, "tune_steps is -1"),
        ({"tune_steps": 40.0}, "tune_steps is 40.0"),
        ({"tune_steps": True}, "tune_steps is True"),
        ({"tune_steps": "40"}, "tune_steps is '40'"),
        ({"allocation": "matrix"}, "split_widths=True"),
        ({"method": "deltamix", "split_widths": True}, "split_widths=True"),
        ({"method": "delta-come", "codebook": "gaussian"}, 'codebook="min-max"'),
        ({"allocation": "bands", "split_widths": False}, 'codebook="min-max"'),
        ({"num_samples": 0}, "num_samples"),
        ({"seq_length": 0}, "seq_length"),
        ({"seed": -1}, "seed"),
        ({"seed": "0"}, "seed"),
        ({"format_version": 99}, "format 99"),
        ({"format_version": 0}, "format_version"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert"),
        ({"calibration": []}, "calibration"),
        ({"calibration": ["", "  \n"]}, "no text"),
        ({"calibration": ""}, "empty name"),
        ({"calibration": [1, 2]}, "list of texts"),
        ({"calibration": 5}, "int"),
        ({"calibration": torch.zeros(0, 4, dtype=torch.int64)}, "[0, 4]"),
        ({"calibration": torch.zeros(4, dtype=torch.int64)}, "[4]"),
        ({"calibration": torch.zeros(2, 4)}, "float32"),
        ({"calibration": torch.zeros(2, 4, dtype=torch.bool)}, "bool"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"ratoi": 0.1}, "ratoi"),
        ({"errors": 3}, "errors is a int"),
        ({"base_fingerprints": ["a"]}, "base_fingerprints is a list"),
        ({"base_kwargs": "token"}, "base_kwargs is a str"),
    ],
)
def test_bad_values_are_named(options, culprit):
    with pytest.raises(DeltaMixError) as error:
        make_config("b", **options)
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)


def test_newer_format_says_upgrade():
    with pytest.raises(DeltaMixError, match="pip install -U deltamix-hf"):
        DeltaMixConfig(base_model="b", format_version=FORMAT_VERSION + 1)
    assert DeltaMixConfig(base_model="b").format_version == FORMAT_VERSION


def test_overlay_dtype():
    def form(dtype, rounded):
        config = make_config("b", bf16_overlay=rounded)
        return overlay_dtype(dtype, config)

    for dtype in (torch.float32, torch.float64):
        assert form(dtype, True) == torch.bfloat16 and form(dtype, False) == dtype
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
        assert form(dtype, True) == dtype  # nothing to win


def test_a_base_from_a_config_json_is_not_the_users():
    """Programs such as lm_eval read a repo's settings and pass them on as the user's."""
    settings = DeltaMixConfig("org/base").to_dict()
    assert DeltaMixConfig("org/base").base_given and not DeltaMixConfig().base_given
    read = DeltaMixConfig.from_dict(settings)
    assert read.base_model == "org/base" and read.get_loading_attributes()["base_given"] is False
    read, _ = DeltaMixConfig.from_dict(settings, return_unused_kwargs=True)
    assert not read.base_given


def test_a_switch_is_refused_with_the_way_to_give_it():
    with pytest.raises(DeltaMixError, match=r"replace\(METHODS\['deltamix-kl'\], fisher=\.\.\.\)"):
        DeltaMixConfig("b", fisher=False)


@pytest.mark.parametrize("method", METHODS)
def test_config_json_names_the_method_and_lists_its_switches(method):
    """The keys of format 2; later versions may change a named method, not what a repo says."""
    stored = DeltaMixConfig("b", method=method).to_dict()
    switches = {name: getattr(METHODS[method], name) for name in SWITCHES}
    assert stored.items() >= (switches | {"method": method, "bits": list(switches["bits"])}).items()
    assert "name" not in stored
    for name in SWITCHES:  # one that is absent, or null, is as the method says
        del stored[name]
    assert DeltaMixConfig.from_dict(stored).method == METHODS[method]
    assert DeltaMixConfig.from_dict(stored | dict.fromkeys(SWITCHES)).method == METHODS[method]
    with pytest.raises(DeltaMixError, match="name"):
        DeltaMixConfig.from_dict(stored | {"name": method})
