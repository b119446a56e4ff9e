"""Compressing without either model in memory: the same delta repo."""

from __future__ import annotations

import shutil

import pytest
from crashes import Crash, crash_at
from safetensors.torch import load_file, save_file
from tiny_pairs import calibration_ids, logits, quick, relative, snapshot

from deltamix_hf import DeltaMixError
from deltamix_hf.integration.compress_repo import compress_streaming

CHAINS = ["llama", "llama_tied", "qwen3", "gpt2", "bert", "mixtral"]
METHODS = {
    "deltamix-kl": {"tune_steps": 0, "calibration": calibration_ids()},
    "deltamix": {"calibration": calibration_ids(), "sequential": True},
    "delta-come": {},
}


def stream(source, output, **options):
    return compress_streaming(source.tuned, output, source.config(**options))


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "deltamix-kl") for name in CHAINS),
        *((name, "deltamix") for name in ("llama_tied", "mixtral")),
        *((name, "delta-come") for name in ("gpt2", "bert")),
    ],
)
def test_the_bytes_are_those_of_compressing_in_memory(pair, tmp_path, name, method):
    source, options = pair(name), {"method": method, **METHODS[method]}
    source.compress(**options).save_pretrained(tmp_path / "memory")
    stream(source, tmp_path / "streamed", **options)
    found, expected = snapshot(tmp_path / "streamed"), snapshot(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["config.json"] == expected["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "streamed"]


def test_a_crash_at_any_part_changes_no_byte(pair, tmp_path):
    source, options = pair("llama_tied"), quick("deltamix-kl") | {"calibration": calibration_ids()}
    stream(source, tmp_path / "whole", **options)
    expected, output = snapshot(tmp_path / "whole"), tmp_path / "out"
    parts = 0
    while parts < 1000:  # the same job, killed again and again
        with pytest.MonkeyPatch.context() as patch:
            kept = crash_at(patch, 30)  # what waits between blocks is written again each time
            try:
                stream(source, output, **options)
                break
            except Crash:
                assert not output.exists()
            finally:
                parts += len(kept)
    assert parts > 100
    assert snapshot(output) == expected
    assert not (tmp_path / ".out.unfinished").exists()


@pytest.mark.untraced
def test_tuning_reads_weights_again_and_ends_where_it_does_in_memory(pair, tmp_path):
    source, options = pair("llama"), {"tune_steps": 8, "calibration": calibration_ids()}
    memory = source.compress(**options)
    streamed = stream(source, tmp_path / "streamed", **options)
    found, expected = (m.config.quantization_config.measured for m in (streamed, memory))
    assert found["positions"] == expected["positions"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    plain = source.compress(**options | {"tune_steps": 0})
    reloaded = source.load(tmp_path / "streamed")
    tuned = relative(logits(plain), logits(memory))
    assert tuned > 1e-3
    assert relative(logits(reloaded), logits(memory)) < 0.1 * tuned


def test_random_tokens_where_no_text_is_given(pair, tmp_path):
    model = stream(pair("llama"), tmp_path / "out", **quick("deltamix-kl"))
    assert model.config.quantization_config.calibration_source == "random tokens"
    with pytest.raises(DeltaMixError, match="cannot write calibration text; give texts"):
        stream(pair("llama"), tmp_path / "other", calibration="self")


def test_encoder_and_decoder_are_no_chain(pair, tmp_path):
    source = pair("t5")
    with pytest.raises(DeltaMixError, match="T5ForConditionalGeneration is no single chain"):
        stream(source, tmp_path / "out", calibration=calibration_ids())
    options = {"method": "deltamix"}
    stream(source, tmp_path / "out", **options)  # nothing is run
    source.compress(**options).save_pretrained(tmp_path / "memory")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "memory")


def test_a_fine_tune_without_a_tensor_is_refused(pair, tmp_path):
    source, folder = pair("llama"), tmp_path / "tuned"
    shutil.copytree(source.tuned, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaMixError, match=r"hold no model.layers.1.mlp.up_proj.weight"):
        compress_streaming(folder, tmp_path / "out", source.config())
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeltaMixError, match="cannot find the model"):
        compress_streaming(tmp_path / "nowhere", tmp_path / "out", source.config())
