"""Registered whoever imports what first; without deltamix_hf an error, never a random model."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from transformers import PreTrainedModel
from transformers.quantizers import auto

import deltamix_hf
from deltamix_hf import DeltaMixConfig, DeltaMixHfQuantizer
from deltamix_hf.integration import model_methods, registration

# Each class loads each repo as it is, then without the notice, with the guards alone.
WITHOUT_US = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
seen = {}

def outcome(auto, folder, **given):
    try:
        getattr(transformers, auto).from_pretrained(folder, **given)
        return "loaded"
    except Exception as error:
        return type(error).__name__, str(error)

classes = json.loads(sys.argv[2])
for name, folder in json.loads(sys.argv[1]).items():
    for auto in classes[name]:
        seen[f"{name} {auto}"] = outcome(auto, folder, ignore_mismatched_sizes=True)
        config = transformers.AutoConfig.from_pretrained(folder)
        del config.transformers_weights
        seen[f"{name} {auto} guards"] = outcome(auto, folder, config=config)
assert "deltamix_hf" not in sys.modules
print(json.dumps(seen))
"""
CLASSES = {
    "llama": ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"],
    "llama_tied": ["AutoModelForCausalLM", "AutoModel"],
    "gpt2": ["AutoModelForCausalLM", "AutoModel", "AutoModelForTokenClassification"],
    "bert": ["AutoModelForMaskedLM", "AutoModel", "AutoModelForQuestionAnswering"],
    "bert_from_headless": ["AutoModelForMaskedLM", "AutoModel"],
    "t5": ["AutoModelForSeq2SeqLM", "AutoModel", "AutoModelForSequenceClassification"],
}


def test_without_us_a_delta_repo_does_not_load_and_names_the_package(delta):
    """In a process that never imports deltamix_hf; one for all, as its imports take seconds."""
    methods = {"llama": "deltamix-kl"}
    folders = {name: str(delta(name, methods.get(name, "delta-come")).folder) for name in CLASSES}
    # our entry point must not import us behind the test's back
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WITHOUT_US, json.dumps(folders), json.dumps(CLASSES)]
    result = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert len(seen) == 2 * sum(map(len, CLASSES.values()))
    for case, (kind, message) in seen.items():
        if case.endswith("guards"):  # the shape of the guard; any other error is an accident
            assert kind == "RuntimeError" and "ignore_mismatched_sizes" in message, case
        else:
            assert kind == "ValueError" and "pip install deltamix-hf" in message, case


def test_registered_once_however_often_asked():
    finders, mapping = list(sys.meta_path), dict(auto.AUTO_QUANTIZER_MAPPING)
    registration.autoload()
    registration.autoload()
    assert sys.meta_path == finders and mapping == auto.AUTO_QUANTIZER_MAPPING
    assert sys.meta_path.count(registration.Finder) == 1
    importlib.reload(deltamix_hf)
    assert sys.meta_path == finders


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_makes_our_classes(pair):
    settings = {"quant_method": "deltamix", "base_model": str(pair("llama").base)}
    for _ in range(2):
        config = auto.AutoQuantizationConfig.from_dict(dict(settings))
        assert type(config) is DeltaMixConfig
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(DeltaMixConfig) == 1
    quantizer = auto.AutoHfQuantizer.from_config(config, pre_quantized=True)
    assert type(quantizer) is DeltaMixHfQuantizer
    merged = auto.AutoHfQuantizer.merge_quantization_configs(
        dict(settings), DeltaMixConfig(dequantize=True)
    )
    assert type(merged) is DeltaMixConfig and merged.dequantize


def test_methods_of_models_are_the_real_ones_once_looked_at():
    assert PreTrainedModel.load_delta is model_methods.load_delta
    for name in registration.METHODS:
        assert inspect.getdoc(getattr(PreTrainedModel, name)), name
    assert isinstance(vars(PreTrainedModel)[registration.PROPERTY], property)


def test_a_transformers_of_other_names_is_left_alone(monkeypatch):
    """Within `import torch` nothing may be raised."""
    for name in ("transformers.quantizers.auto", "transformers.modeling_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registration.autoload()


def test_public_names():
    assert all(hasattr(deltamix_hf, name) for name in deltamix_hf.__all__)
    assert set(deltamix_hf.__all__) <= set(dir(deltamix_hf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deltamix_hf.nothing  # noqa: B018
