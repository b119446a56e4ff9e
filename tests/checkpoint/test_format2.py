"""Delta repos that were written at commit d1402f4 still load, verify and save as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deltamix_hf import DeltaMixConfig
from deltamix_hf.cli import app

FORMAT2 = Path(__file__).parents[1] / "fixtures" / "format2"
# name -> its base, and an ending of tensor names that only this kind of repo has
REPOS = {
    "llama-deltamix-kl": ("llama", ".dm_u"),
    "llama-deltamix": ("llama", ".dm_zeros"),
    "llama-delta-come": ("llama", ".dm_zeros"),
    "mixtral-deltamix-kl": ("mixtral", "_dm_counts"),
    "llama-tied-more-tokens": ("llama-tied", ".dm_rows"),
}
each_repo = pytest.mark.parametrize("name", REPOS)


def load(name: str) -> torch.nn.Module:
    config = DeltaMixConfig(base_model=FORMAT2 / "bases" / REPOS[name][0])
    return AutoModelForCausalLM.from_pretrained(
        FORMAT2 / name / "delta", quantization_config=config
    )


def test_every_repo_is_tested():
    assert {folder.name for folder in FORMAT2.iterdir()} == {*REPOS, "bases"}


@each_repo
def test_logits(name):
    """Within 1e-5 (RMS): float32 rounds otherwise on another machine or with other kernels."""
    expected = load_file(FORMAT2 / name / "expected.safetensors")
    with torch.no_grad():
        found = load(name)(expected["input_ids"]).logits
    assert found.dtype == torch.float32 and found.shape == expected["logits"].shape
    assert (found - expected["logits"]).norm() < 1e-5 * expected["logits"].norm()


@each_repo
def test_verify_accepts_it(name):
    base, ending = REPOS[name]
    repo = FORMAT2 / name / "delta"
    command = ["verify", str(repo), "--base", str(FORMAT2 / "bases" / base)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert any(key.endswith(ending) for key in load_file(repo / "model.safetensors"))


@each_repo
def test_saving_it_again_writes_the_same_weight_file(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    file = "model.safetensors"
    assert (tmp_path / file).read_bytes() == (FORMAT2 / name / "delta" / file).read_bytes()
