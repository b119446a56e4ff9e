"""transformers changes its private parts as it likes: only a few modules may lean on them."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import deltamix_hf
from deltamix_hf import transformers_private

ROOT = Path(deltamix_hf.__file__).parent
MAY = ("integration/", "vllm/", "transformers_private.py")  # the plug-ins, and what others need
PUBLIC = {
    "transformers",
    "transformers.cli.transformers",  # the command itself
    "transformers.generation.configuration_utils",  # documented classes of options
    "transformers.pytorch_utils",  # documented layers, Conv1D
    "transformers.utils",
    "transformers.utils.hub",  # cached_file, what AutoModel.from_pretrained finds files with
    "transformers.utils.import_utils",  # is_..._available
    "transformers.utils.logging",  # documented
    "transformers.utils.quantization_config",  # documented base of configs
}


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def named_modules(tree: ast.AST) -> set[str]:
    """Modules of transformers that are imported, by statement or by a name in a text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            private = {name for name in inner if name.rpartition(".")[2].startswith("_")}
            found |= {node.module} | private | {name for name in inner if is_module(name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch(r"transformers(\.\w+)+", node.value) else set()
    return {name for name in found if name.partition(".")[0] == "transformers"}


FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(MAY)])
def test_only_public_modules_are_imported(name):
    assert named_modules(ast.parse(FILES[name].read_text(encoding="utf-8"))) <= PUBLIC


def test_private_modules_are_seen():
    texts = [
        "import transformers.core_model_loading",
        "from transformers.integrations import moe",
        "from transformers import modeling_utils",
        "def f():\n    from transformers.quantizers.auto import x",
        "import_module('transformers.quantizers.base')",
    ]
    for text in texts:
        assert named_modules(ast.parse(text)) - PUBLIC


@pytest.mark.parametrize(
    "name", [name for names in transformers_private._MODULES.values() for name in names]
)
def test_every_private_part_is_there(name):
    found = getattr(importlib.import_module("deltamix_hf.transformers_private"), name)
    assert found.__name__.rpartition(".")[2] == name


def test_unknown_parts():
    with pytest.raises(AttributeError, match="nothing_such"):
        transformers_private.nothing_such  # noqa: B018
