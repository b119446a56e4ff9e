"""A LoRA as the fine-tune: exact at its rank, nothing else stored, nothing merged to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_pairs import logits, make_config, make_tokenizer, relative
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.cli import app
from deltamix_hf.integration.compress_repo import compress_adapter, is_adapter

RANK = 4


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory) -> Path:
    """A trained-like LoRA on all projections of the tiny llama, with a tokenizer."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model = AutoModelForCausalLM.from_pretrained(pair("llama").base)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    get_peft_model(model, settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(pair, adapter) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(pair("llama").base)
    model.load_adapter(adapter)
    return logits(model)


def test_exact_at_its_rank(pair, adapter, expected, tmp_path):
    source = pair("llama")
    before = {p.name: p.read_bytes() for p in source.base.iterdir()}
    config = make_config(source.base, ratio=0.5, num_samples=8, tune_steps=3)
    model = compress_adapter(str(adapter), config)
    model.save_pretrained(tmp_path / "delta")
    assert relative(logits(source.load(tmp_path / "delta")), expected) < 0.02  # 8 bits
    report = inspect_repo(tmp_path / "delta")
    assert len(report.matrices) == 10 and not report.overlay  # nothing else differs
    for matrix in report.matrices.values():
        assert matrix.rank == RANK and matrix.widths == {(8, 8): RANK}
    assert AutoTokenizer.from_pretrained(tmp_path / "delta")("w7")["input_ids"] == [7]
    assert {p.name: p.read_bytes() for p in source.base.iterdir()} == before


def test_beside_the_base_and_in_a_smaller_budget(pair, adapter, expected, tmp_path):
    source = pair("llama")
    output = tmp_path / "delta"
    command = ["compress", str(adapter), "--base", str(source.base), "--output", str(output)]
    done = CliRunner().invoke(app, [*command, "--ratio", "1/4", "--method", "deltamix"])
    assert done.exit_code == 0, done.output
    model = source.load(source.base)
    plain = relative(logits(model), expected)
    model.load_delta(output, "lora")
    assert relative(logits(model), expected) < 0.2 * plain


def test_half_precision_bases_do_not_round_the_adapter(pair, adapter, expected, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pair("llama").base, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    config = make_config(tmp_path / "base", ratio=0.5, num_samples=8, tune_steps=0)
    compress_adapter(str(adapter), config).save_pretrained(tmp_path / "delta")
    report = inspect_repo(tmp_path / "delta")
    assert {matrix.rank for matrix in report.matrices.values()} == {RANK}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "delta").dtype == torch.bfloat16


def test_what_is_no_adapter_for_this_base(pair, adapter, tmp_path, copied):
    assert is_adapter(str(adapter)) and not is_adapter(str(pair("llama").tuned))
    with pytest.raises(DeltaMixError, match="does not fit the base"):
        compress_adapter(str(adapter), DeltaMixConfig(pair("bert").base, ratio=0.5))
    empty = copied(adapter)
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(DeltaMixError, match="as safetensors"):
        compress_adapter(str(empty), DeltaMixConfig(pair("llama").base, ratio=0.5))
