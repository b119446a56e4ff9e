"""Models whose repos bring code of their own: run with --trust-remote-code, else never."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pairs import logits, make_tokenizer, text_of, token_ids
from transformers import AutoModelForCausalLM

from deltamix_hf import DeltaMixConfig, cli
from deltamix_hf.integration.compress_repo import compress_streaming

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "{kind}"
"""
MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

Path({mark!r}).write_text("ran")

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found
"""


@pytest.fixture(scope="module")
def home(pair, tmp_path_factory) -> SimpleNamespace:
    """A pair of a class that transformers has not, and the file that its code writes."""
    folder = tmp_path_factory.mktemp("own_code")
    mark, source = folder / "mark", pair("llama_tied")
    found = SimpleNamespace(mark=mark, delta=folder / "delta", texts=folder / "texts.txt")
    for name, plain in (("base", source.base), ("tuned", source.tuned)):
        copy = Path(shutil.copytree(plain, folder / name))
        config = json.loads((copy / "config.json").read_text())
        config["model_type"], config["architectures"] = "own_llama", ["OwnForCausalLM"]
        config["auto_map"] = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        }
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "configuration_own.py").write_text(CONFIGURATION.format(kind="own_llama"))
        (copy / "modeling_own.py").write_text(MODELING.format(mark=str(mark)))
        make_tokenizer().save_pretrained(copy)
        setattr(found, name, copy)
    found.texts.write_text("\n".join(text_of(row) for row in token_ids(8, 20, seed=3)))
    command = ["compress", found.tuned, "--base", found.base, "--output", found.delta]
    command += ["--ratio", "1/2", "--method", "delta-come", "--trust-remote-code"]
    cli.app([*map(str, command)], standalone_mode=False)
    return found


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_the_delta_repo_runs_the_code_it_took_along(home):
    expected, base, found = (logits(load(f)) for f in (home.tuned, home.base, home.delta))
    assert (found - expected).norm() < 0.3 * (base - expected).norm()
    beside = load(home.base)
    beside.load_delta(str(home.delta), "own")
    torch.testing.assert_close(logits(beside, delta_names="own"), found)


def test_from_the_files_it_is_the_same_repo(home, tmp_path):
    settings = DeltaMixConfig(home.base, ratio=0.5, method="delta-come")
    compress_streaming(home.tuned, tmp_path / "delta", settings, trust_remote_code=True)
    names = {path.name for path in home.delta.iterdir()}
    assert {"modeling_own.py", "configuration_own.py"} <= names
    assert names == {path.name for path in (tmp_path / "delta").iterdir()}
    torch.testing.assert_close(logits(load(tmp_path / "delta")), logits(load(home.delta)))


COMPRESS = "compress {tuned} --base {base} --output {new} --method delta-come --ratio 1/2"
COMMANDS = {
    "compress": COMPRESS,
    "low_memory": f"{COMPRESS} --low-memory",
    "inspect": "inspect {delta}",
    "verify": "verify {delta}",
    "diff": "diff {tuned} --base {base}",
    "merge": "merge {delta} --output {new}",
    "generate": "generate {delta} ab --max-new-tokens 2",
    "eval": "eval {delta} --text {texts} --finetuned {tuned} --samples 2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_it_only_if_told(home, tmp_path, monkeypatch, capsys, name):
    places = {**vars(home), "new": tmp_path / "new"}
    arguments = COMMANDS[name].format(**places).split()
    home.mark.unlink(missing_ok=True)
    for module in [m for m in sys.modules if m.endswith("modeling_own")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", ["deltamix", *arguments])
    with pytest.raises(SystemExit) as refused:
        cli.main()
    printed = capsys.readouterr()
    assert refused.value.code == 1 and not home.mark.exists()
    assert "--trust-remote-code" in printed.err + printed.out
    cli.app([*arguments, "--trust-remote-code"], standalone_mode=False)
    assert home.mark.exists()
