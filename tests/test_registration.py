"""Known to transformers with deltamix_hf, an error (never a random model) without it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

from transformers.quantizers import auto

import deltamix_hf
from deltamix_hf import DeltaMixConfig, DeltaMixHfQuantizer
from deltamix_hf.registration import register

WITHOUT_US = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
seen = {}
classes = json.loads(sys.argv[2])
for name, folder in json.loads(sys.argv[1]).items():
    seen[name] = {}
    for auto in classes[name]:
        try:
            getattr(transformers, auto).from_pretrained(folder)
            seen[name][auto] = "loaded"
        except Exception as error:
            seen[name][auto] = type(error).__name__
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


def test_without_us_a_delta_repo_does_not_load(delta):
    """In a process that never imports deltamix_hf; one for all, as its imports take seconds."""
    methods = {"llama": "deltamix-kl"}
    folders = {name: str(delta(name, methods.get(name, "delta-come")).folder) for name in CLASSES}
    # a torch.backends entry point must not import us behind the test's back
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WITHOUT_US, json.dumps(folders), json.dumps(CLASSES)]
    result = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    # the shape of the guard; any other error would be an accident
    assert seen == {name: dict.fromkeys(CLASSES[name], "RuntimeError") for name in CLASSES}


def test_registered_once_however_often_imported():
    known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register(DeltaMixConfig, DeltaMixHfQuantizer)
    importlib.reload(sys.modules["deltamix_hf.registration"])
    assert known == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert known.count(DeltaMixConfig) == 1
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["deltamix"] is DeltaMixConfig
    assert auto.AUTO_QUANTIZER_MAPPING["deltamix"] is DeltaMixHfQuantizer


def test_public_names():
    assert all(hasattr(deltamix_hf, name) for name in deltamix_hf.__all__)
