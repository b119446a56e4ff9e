"""Every code block of the README and of docs/ runs: Python and `deltamix` commands, page by page.

A page's blocks run in order in one namespace and one empty folder, with the repos that pages name
(`org/base`, `me/my-finetune`, ...) on a local Hub. All pages run in one child process, because
huggingface_hub reads HF_ENDPOINT when imported; the tests look at what it wrote down. Blocks fenced
as `text` are output, or commands that install packages or run this repository's Makefile. Where a
block says nothing else, few texts are calibrated on, the optimum of widths is not proved, and
models are compiled without machine code (`multi_delta/test_grouped.py` has that).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import markdown
import pytest
from local_hub import TOKEN, LocalHub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, SHOWN = ("python", "bash"), ("text", "json", "yaml")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
LEFT_OUT = ("deltamix chat", "deltamix serve")  # they wait for people; tests of their own run them


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of a page's fenced blocks."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


# In the child process


def run_pages(folder: Path) -> dict[str, Any]:
    """Page -> the trace of its first failure, or None; and how many blocks ran."""
    be_brief()
    make_repos(folder / "made")
    outcome: dict[str, Any] = {}
    for page in PAGES:
        place = folder / name_of(page).replace("/", "-")
        place.mkdir()
        os.chdir(place)
        texts = "\n".join(f"once upon a time {i} of {i * i}" for i in range(12))
        for name in ("texts.txt", "heldout.txt"):
            Path(name).write_text(texts)
        namespace: dict[str, Any] = {}
        ran, failure = 0, None
        for language, code in blocks(page):
            try:
                if language == "python":
                    exec(compile(code, f"{name_of(page)}, block {ran}", "exec"), namespace)
                elif language == "bash":
                    run_commands(code)
                else:
                    continue
                ran += 1
            except (Exception, SystemExit):
                failure = f"{code}\n{traceback.format_exc()}"
                break
        outcome[name_of(page)] = {"ran": ran, "failure": failure}
    return outcome


def be_brief() -> None:
    """Change defaults that set how long a block takes, not what it does."""
    import torch

    from deltamix_hf import DeltaMixConfig

    names = inspect.getfullargspec(DeltaMixConfig.__init__).args[1:]
    defaults = dict(zip(names, DeltaMixConfig.__init__.__defaults__, strict=True))
    defaults |= {"num_samples": 8, "allocation_gap": 1.0}
    DeltaMixConfig.__init__.__defaults__ = tuple(defaults.values())
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def run_commands(code: str) -> None:
    """Each line is a `deltamix` command; anything else is a mistake of the page."""
    from deltamix_hf import cli

    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or line.startswith(LEFT_OUT):
            continue
        assert words[0] == "deltamix", f"not a command of ours, so it is not run: {line}"
        said = io.StringIO()
        sys.argv = words
        try:
            with contextlib.redirect_stderr(said):
                cli.main()
        except SystemExit as end:
            assert not end.code, f"{line}\n{said.getvalue()}"


def make_repos(folder: Path) -> None:
    """A base, its fine-tunes and their deltas, on the Hub."""
    import torch
    from tiny_models import fine_tune, tiny_llama, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from deltamix_hf import DeltaMixConfig

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    base = tiny_llama(tokenizer, 1)
    for repo in ("org/base", "me/my-finetune", "me/math", "me/code"):
        if repo != "org/base":
            fine_tune(base)
        base.push_to_hub(repo, token=TOKEN)
        tokenizer.push_to_hub(repo, token=TOKEN)
    for name in ("math", "code"):
        settings = DeltaMixConfig(base_model="org/base", ratio=1 / 8, method="delta-come")
        tuned = AutoModelForCausalLM.from_pretrained(f"me/{name}", quantization_config=settings)
        tuned.push_to_hub(f"me/{name}-delta", token=TOKEN)


# In pytest's process


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("docs")
    with LocalHub() as hub:
        result = subprocess.run(
            [sys.executable, __file__, str(folder)],
            env={**hub.environment(folder / "home"), "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "outcome.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_a_page_run(page: Path, outcome: dict[str, Any]) -> None:
    assert outcome[name_of(page)]["failure"] is None, outcome[name_of(page)]["failure"]
    assert outcome[name_of(page)]["ran"] == sum(language in RUN for language, _ in blocks(page))


def test_most_pages_have_blocks(outcome: dict[str, Any]) -> None:
    """So that a change of the pages' form cannot make all of this pass by running nothing."""
    ran = {name: found["ran"] for name, found in outcome.items()}
    assert ran["README.md"] >= 2 and ran["docs/index.md"] >= 5 and ran["docs/many.md"] >= 5, ran


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path) -> None:
    found = blocks(page)
    assert {language for language, _ in found} <= {*RUN, *SHOWN, "console"}
    fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(found), "a fence that is indented or has options is not run"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_are_lists_on_the_site(page: Path) -> None:
    """Where GitHub sees a list, mkdocs may need an empty line before it or four spaces within."""
    html = markdown.markdown(page.read_text(), extensions=["tables", "pymdownx.superfences"])
    lost = [line for p in re.findall(r"<p>.*?</p>", html, re.S) for line in p.splitlines()[1:]]
    assert not [line for line in lost if re.match(r"([-*]|\d+\.) |\|", line)]


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of docs/ are checked by `mkdocs build --strict`."""
    found = LINK.findall((ROOT / "README.md").read_text())
    assert len(found) >= 5
    assert not [link for link in found if not (ROOT / link).exists()]


def test_the_architecture_names_what_there_is() -> None:
    """Paths, and beside the path of a module functions and classes that it defines."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    roots = (ROOT, ROOT / "deltamix_hf")
    paths = set(re.findall(r"`([\w/.-]+(?:\.\w+|/))`", page)) - {"config.json"}  # a delta repo's
    assert len(paths) > 40
    assert not [p for p in paths if not any((root / p).exists() for root in roots)]
    for path, first, second in re.findall(r"`([\w/]+\.py)`:\s+`(\w+)`(?:\s+and\s+`(\w+)`)?", page):
        code = (ROOT / "deltamix_hf" / path).read_text()
        for name in filter(None, (first, second)):
            assert re.search(rf"^ *(class|def) {name}\b", code, re.MULTILINE), f"{path}: {name}"


def test_packages_name_what_they_have() -> None:
    """`module.function` in the paragraph at the top of a package."""
    for path in (ROOT / "deltamix_hf").glob("*/__init__.py"):
        paragraph = path.read_text().split('"""')[1]
        for module, name in re.findall(r"`(\w+)\.(?!py)(\w+)`", paragraph):
            code = path.with_name(f"{module}.py").read_text()
            assert re.search(rf"^(class|def) {name}\b", code, re.MULTILINE), f"{path}: {name}"


def test_every_command_and_option_is_in_the_reference() -> None:
    """docs/cli.md is written by `make docs`; this is where it is found stale."""
    import typer.main

    from deltamix_hf.cli import app

    text = (ROOT / "docs" / "cli.md").read_text()
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        _, found, rest = text.partition(f"## `deltamix {name}`\n")
        assert found, f"docs/cli.md lacks {name}: run `make docs`"
        section = rest.partition("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts:
                assert option in section, f"docs/cli.md lacks {name} {option}: run `make docs`"


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "outcome.json").write_text(json.dumps(run_pages(where)))


def test_limits_are_in_the_code_and_have_tests():
    """Every row of docs/limits.md quotes an error that the package raises, and names its test."""
    said = []
    for file in sorted((ROOT / "deltamix_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (?!Refused|---)", line)]
    assert len(rows) > 15
    for row in rows:
        quotes, tests = re.findall(r'"([^"]+)"', row), re.findall(r"`(tests/[^`]+)`", row)
        assert quotes and tests, row
        for quote in quotes:
            assert any(quote in text for text in said), quote
    for test in re.findall(r"`(tests/[^`]+)`", page):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
