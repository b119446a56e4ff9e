"""The `deltamix` command from the fine-tune to an answer, in one process, on a tiny pair."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_pairs import logits, make_tokenizer, snapshot, text_of, token_ids, weight_bytes
from transformers import AutoModelForCausalLM

from deltamix_hf import cli
from deltamix_hf.compression import model as compress_model

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
RATIO = "1/4"


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("inspect", ...)`: exit status, stdout and stderr of a command."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["deltamix", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli.main() or 0
        except SystemExit as stopped:
            code = stopped.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call


@pytest.fixture(scope="module")
def home(pair, tmp_path_factory) -> SimpleNamespace:
    """A base, a fine-tune with a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("home")
    source = pair("llama_tied")
    tuned = Path(shutil.copytree(source.tuned, folder / "tuned"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tuned)
    texts = folder / "texts.txt"
    texts.write_text("\n".join(text_of(row) for row in token_ids(8, 20, seed=3)))
    return SimpleNamespace(base=source.base, tuned=tuned, texts=texts, folder=folder)


@pytest.fixture(scope="module")
def repo(home) -> Path:
    """What `deltamix compress` makes of it."""
    output = home.folder / "delta"
    command = ["compress", home.tuned, "--base", home.base, "--output", output, "--ratio", RATIO]
    cli.app([*map(str, command), "--method", "delta-come"], standalone_mode=False)
    return output


def test_compress_writes_a_repo_that_says_what_it_is(run, home, tmp_path):
    output = tmp_path / "delta"
    arguments = ("compress", home.tuned, "--base", home.base, "--output", output)
    done = run(*arguments, "--ratio", RATIO, "--calibration", home.texts, "--method", "deltamix")
    assert done.code == 0, done.err
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["ratio"] == 0.25 and config["method"] == "deltamix"
    printed = re.search(r"all +([\d.]+) +([\d.]+) of bf16", done.out)
    assert float(printed[1]) == pytest.approx(weight_bytes(output) / 1e6, abs=0.005)
    assert float(printed[2]) <= 0.25
    assert str(home.texts) in done.out.replace("\n", "") and "deltamix chat" in done.out
    again = run(*arguments)
    assert again.code == 1 and "--overwrite" in again.err and again.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


def test_low_memory_writes_the_same_repo(run, home, tmp_path, monkeypatch):
    arguments = ("compress", home.tuned, "--base", home.base, "--ratio", RATIO)
    arguments += ("--calibration", home.texts, "--method", "deltamix")
    assert run(*arguments, "--output", tmp_path / "memory").code == 0
    warned = []
    monkeypatch.setattr(compress_model.logger, "warning", lambda *line: warned.append(line))
    done = run(*arguments, "--output", tmp_path / "disk", "--low-memory")
    assert done.code == 0, done.err
    assert snapshot(tmp_path / "disk") == snapshot(tmp_path / "memory")
    ((message, *gigabytes),) = warned
    assert "GB of memory and" in message % tuple(gigabytes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.parametrize("budget", [("--bits", "4"), ("--megabytes", "0.0452")])
def test_budgets_in_other_units(run, home, tmp_path, budget):
    """A quarter of 16 bits; a quarter of 0.1809 MB."""
    output = tmp_path / "delta"
    command = ("compress", home.tuned, "--base", home.base, "--output", output)
    done = run(*command, *budget, "--method", "delta-come")
    assert done.code == 0, done.err
    assert 0.9 * 45_200 < weight_bytes(output) <= 45_230


@pytest.mark.parametrize("ratio", ["much", "1/0", "2", "-1/4"])
def test_a_bad_ratio(run, home, tmp_path, ratio):
    done = run(
        "compress", home.tuned, "--base", home.base, "--output", tmp_path / "x", f"--ratio={ratio}"
    )
    assert done.code == 1 and "ratio" in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_one_budget(run, home, tmp_path):
    done = run(
        "compress", home.tuned, "--base", home.base, "--output", tmp_path / "x", "--bits", "1",
        "--ratio", "1/16",
    )  # fmt: skip
    assert done.code == 1 and "one of" in done.err


def test_compressing_a_delta_is_refused(run, home, repo, tmp_path):
    done = run("compress", repo, "--base", home.base, "--output", tmp_path / "x")
    assert done.code == 1 and "is a delta repo already" in done.err


def test_merge_gives_the_dense_model(run, repo, tmp_path):
    output = tmp_path / "dense"
    done = run("merge", repo, "--output", output)
    assert done.code == 0, done.err
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert (output / "tokenizer.json").read_bytes() == (repo / "tokenizer.json").read_bytes()
    expected = logits(AutoModelForCausalLM.from_pretrained(repo))
    found = logits(AutoModelForCausalLM.from_pretrained(output))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not any(".dm_" in name for name in load_file(output / "model.safetensors"))
    before = snapshot(output)
    assert run("merge", repo, "--output", output).code == 1 and snapshot(output) == before
    assert run("merge", repo, "--output", output, "--overwrite").code == 0


def test_merge_of_a_whole_model_is_refused(run, home, tmp_path):
    done = run("merge", home.tuned, "--output", tmp_path / "x")
    assert done.code == 1 and "not a delta repo" in done.err


def test_base_can_be_named_again(run, home, repo, tmp_path):
    """A delta made from a base that lies elsewhere here."""
    moved = Path(shutil.copytree(repo, tmp_path / "delta"))
    config = json.loads((moved / "config.json").read_text())
    config["quantization_config"]["base_model"] = "/nowhere/base"
    (moved / "config.json").write_text(json.dumps(config))
    lost = run("merge", moved, "--output", tmp_path / "dense")
    assert lost.code == 1 and "/nowhere/base" in lost.err and not (tmp_path / "dense").exists()
    assert run("merge", moved, "--output", tmp_path / "dense", "--base", home.base).code == 0


def test_eval_against_the_fine_tune(run, home, repo):
    arguments = ("eval", repo, "--text", home.texts)
    done = run(*arguments, "--finetuned", home.tuned, "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert figures["fine-tune"]["kl"] == 0 and figures["fine-tune"]["same_first_choice"] == 1
    assert 0 < figures["delta"]["kl"] < figures["base"]["kl"]
    assert figures["delta"]["tokens"] == 8 * 19
    nll = {name: row["nll"] for name, row in figures.items()}
    gain = (nll["delta"] - nll["base"]) / (nll["fine-tune"] - nll["base"])
    assert figures["delta"]["gain_kept"] == pytest.approx(gain)
    assert figures["delta"]["perplexity"] == pytest.approx(math.exp(nll["delta"]))
    table = run(*arguments, "--finetuned", home.tuned)
    assert table.code == 0 and "gain kept" in table.out and "base" in table.out


def test_eval_alone_gives_perplexity(run, home, repo):
    done = run("eval", repo, "--text", home.texts, "--samples", "4", "--json")
    figures = json.loads(done.out)
    assert set(figures) == {"base", "delta"} and figures["delta"]["tokens"] == 4 * 19
    assert "kl" not in figures["delta"]
    refused = run("eval", home.tuned, "--text", home.texts)
    assert refused.code == 1 and "not a delta repo" in refused.err


def test_generate_goes_on_from_the_prompt(run, repo):
    done = run("generate", repo, "w5 w6 w7", "--max-new-tokens", "6")
    assert done.code == 0, done.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(repo), make_tokenizer()
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]
    assert done.out.split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_generate_needs_a_tokenizer_and_a_model_that_writes(run, delta):
    bare = run("generate", delta("llama").folder, "w5")
    assert bare.code == 1 and "no tokenizer" in bare.err
    encoder = run("generate", delta("bert").folder, "w5")
    assert encoder.code == 1 and "cannot generate" in encoder.err


def test_chat_remembers_the_turns(run, repo, monkeypatch):
    said = iter(["w5 w6", "w7", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    done = run("chat", repo, "--max-new-tokens", "4")
    assert done.code == 0, done.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(repo), make_tokenizer()
    text, answers = "w5 w6 ", []
    for turn in ("w7 ", ""):
        ids = tokenizer(text, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True))
        text += f"{answers[-1]} {turn}"
    assert done.out.split() == " ".join(answers).split()


def test_chat_needs_a_template(run, repo, tmp_path):
    bare = Path(shutil.copytree(repo, tmp_path / "delta"))
    (bare / "chat_template.jinja").unlink()
    done = run("chat", bare)
    assert done.code == 1 and "no chat template" in done.err and "deltamix generate" in done.err


def test_diff_prints_distances_and_a_budget(run, home):
    done = run("diff", home.tuned, "--base", home.base)
    assert done.code == 0, done.err
    assert "model.layers.*.mlp.up_proj" in done.out and "1/8" in done.out
    figures = json.loads(run("diff", home.tuned, "--base", home.base, "--json").out)
    assert figures["matrices"]["model.layers.0.mlp.up_proj"]["shape"] == [128, 64]
    assert [b["ratio"] for b in figures["budgets"]] == [1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
    same = run("diff", home.base, "--base", home.base)
    assert same.code == 0 and "identical" in same.out


def test_env_names_versions_and_kernels(run):
    done = run("env")
    assert done.code == 0
    assert torch.__version__ in done.out and "DELTAMIX_KERNEL" in done.out


def test_help_of_every_command_has_an_example(run):
    listing = run("--help").out
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert {"compress", "diff", "merge", "eval", "generate", "chat", "push", "env"} <= set(names)
    for name in names:
        done = run(name, "--help")
        assert done.code == 0 and name in listing
        assert f"deltamix {name}" in " ".join(done.out.split()), name


def test_errors_are_one_line_and_debug_shows_the_trace(run, tmp_path):
    missing = str(tmp_path / "nothing")
    done = run("merge", missing, "--output", tmp_path / "x")
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1
    with pytest.raises(Exception, match="nothing"):
        cli_debug(missing, tmp_path)
    unknown = run("no-such-command")
    assert unknown.code == 2


def cli_debug(missing: str, folder: Path) -> None:
    sys.argv = ["deltamix", "merge", missing, "--output", str(folder / "x"), "--debug"]
    cli.main()


def test_ctrl_c_leaves_no_half_file_and_the_work(home, tmp_path):
    """A real process, a real SIGINT, while matrices are being written."""
    for attempt in range(3):  # on a busy machine the job may be over before the signal comes
        folder = tmp_path / str(attempt)
        code, printed = interrupted(home, folder / "delta")
        if code != 0:
            break
    assert code == 130, printed
    assert "interrupted" in printed and "goes on" in printed and "Traceback" not in printed
    assert [p.name for p in folder.iterdir()] == [".delta.unfinished"]


def interrupted(home, output: Path) -> tuple[int, str]:
    """Exit status and stderr of a compression that gets Ctrl-C once its work folder has files."""
    output.parent.mkdir()
    command = [sys.executable, "-m", "deltamix_hf", "compress", str(home.tuned)]
    command += ["--base", str(home.base), "--output", str(output), "--ratio", RATIO]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores it, and its children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    work = output.with_name(f".{output.name}.unfinished")
    while process.poll() is None and not (work.is_dir() and any(work.iterdir())):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    return process.returncode, printed
