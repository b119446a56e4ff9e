"""Compressing without either model in memory: the same delta repo."""

from __future__ import annotations

import pytest
import torch
from test_resume import Crash, crash_at
from tiny_pairs import calibration_ids, logits, quick, snapshot, weight_bytes

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.streaming import compress_streaming

CHAINS = ["llama", "llama_tied", "qwen3", "gpt2", "bert"]
METHODS = {
    "deltamix-kl": {"tune_steps": 0, "calibration": calibration_ids()},
    "deltamix": {"calibration": calibration_ids(), "sequential": True},
    "delta-come": {},
}


def stream(source, output, **options):
    return compress_streaming(source.tuned, output, source.config(**options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHAINS)
def test_the_bytes_are_those_of_compressing_in_memory(pair, tmp_path, name, method):
    source, options = pair(name), {"method": method, **METHODS[method]}
    source.compress(**options).save_pretrained(tmp_path / "memory")
    stream(source, tmp_path / "streamed", **options)
    found, expected = snapshot(tmp_path / "streamed"), snapshot(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["config.json"] == expected["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "streamed"]
