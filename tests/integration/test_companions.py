"""The files beside a fine-tune's weights: all small ones that are neither weights nor code."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from tiny_pairs import calibration_ids, make_tokenizer
from transformers import AutoTokenizer

from deltamix_hf.integration import companions
from deltamix_hf.integration.companions import copy_companions
from deltamix_hf.integration.compress_repo import compress_streaming

TAKEN = {  # of chat models, sentence-transformers, Marian, video and speech models, and others
    "additional_chat_templates/rag.jinja": "{{ 'rag' }}",
    "chat_template.json": '{"chat_template": "{{ m }}"}',
    "modules.json": "[]",
    "sentence_bert_config.json": '{"max_seq_length": 128}',
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "source.spm": "\0pieces",
    "target.spm": "\0pieces",
    "vocab.bpe": "a b",
    "qwen.tiktoken": "YQ== 0",
    "normalizer.json": "{}",
    "speaker/deep/er/voice.json": "{}",
    "LICENSE": "Apache",
    "dict.txt": "a",
}
LEFT = ["2_Dense/model.safetensors", "modeling_x.py", "optimizer.pt", "scaler.PKL", "a/b/c.sh"]
UNSAID = ["README.md", ".git/config", "checkpoint-5/tokenizer.json", "training_args.bin",
          "pytorch_model.bin", "x/adapter_config.json", "x/.hidden"]  # fmt: skip


def fill(folder: Path, names: dict[str, str]) -> None:
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tuned(pair, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(pair("llama").tuned, tmp_path_factory.mktemp("many") / "tuned"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "TOOLS"}
    tokenizer.save_pretrained(folder)
    fill(folder, {**TAKEN, **dict.fromkeys([*LEFT, *UNSAID], "x")})
    return folder


@pytest.fixture(scope="module")
def saved(pair, tuned, tmp_path_factory) -> Path:
    model = pair("llama").load(tuned, quantization_config=pair("llama").config(method="delta-come"))
    model.save_pretrained(folder := tmp_path_factory.mktemp("saved") / "delta")
    return folder


def test_all_that_is_small_travels(tuned, saved):
    own = {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    named = {"additional_chat_templates/tool_use.jinja"}
    assert names_in(saved) == own | tokenizer | named | TAKEN.keys()
    for name in names_in(saved) - own:
        assert (saved / name).read_bytes() == (tuned / name).read_bytes(), name
    found = AutoTokenizer.from_pretrained(saved)
    turn = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(turn, chat_template="tool_use", tokenize=False) == "TOOLS"


def test_what_stays_is_logged(tuned, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(companions.logger, "level", logging.WARNING)
    copy_companions(str(tuned), tmp_path)
    assert all(repr(name) in caplog.text for name in LEFT)
    assert not any(name in caplog.text for name in UNSAID)


def test_from_files_the_same(pair, tuned, saved, tmp_path):
    config = pair("llama").config(tune_steps=0, calibration=calibration_ids())
    compress_streaming(tuned, tmp_path / "streamed", config)
    assert names_in(tmp_path / "streamed") == names_in(saved)


def test_saved_again_and_over_an_earlier_one(pair, saved, tmp_path):
    """Nested files replace those of before, and what is somebody's own stays."""
    fill(tmp_path / "again", {"1_Pooling/config.json": "old", "1_Pooling/own.txt": "mine"})
    pair("llama").load(saved).save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(saved) | {"1_Pooling/own.txt"}
    pooling = "1_Pooling/config.json"
    assert (tmp_path / "again" / pooling).read_text() == TAKEN[pooling]
    assert os.access(tmp_path / "again" / pooling, os.R_OK)


def test_links_out_and_bounds(tmp_path, monkeypatch):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    source = tmp_path / "source"
    fill(
        source, {"inside.json": "{}", "a/b/c/d/e/deep.json": "{}", "a/b/c/d/e/f/deeper.json": "{}"}
    )
    (source / "out.json").symlink_to(secret)
    (source / "folder").symlink_to(tmp_path)
    (source / "gone.json").symlink_to(tmp_path / "nothing")
    (source / "loop.json").symlink_to(source / "loop.json")
    os.mkfifo(source / "pipe.json")
    (source / "in.json").symlink_to(source / "inside.json")
    copy_companions(str(source), target := tmp_path / "target")
    assert names_in(target) == {"inside.json", "in.json", "a/b/c/d/e/deep.json"}
    assert not (target / "in.json").is_symlink()
    monkeypatch.setattr(companions, "MOST_FILES", 2)
    copy_companions(str(source), few := tmp_path / "few")
    assert len(names_in(few)) == 2
    fill(source, {"large.json": "x" * 100})
    monkeypatch.setattr(companions, "MOST_BYTES", 50)
    copy_companions(str(source), light := tmp_path / "light")
    assert names_in(light) and "large.json" not in names_in(light)
