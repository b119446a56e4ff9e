"""Fresh processes: delta repos load without an import of ours, and nobody else pays for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pairs import make_tokenizer, text_of, token_ids
from transformers import AutoModelForCausalLM

LIGHT = [
    "deltamix_hf",
    "deltamix_hf.constants",
    "deltamix_hf.errors",
    "deltamix_hf.integration",
    "deltamix_hf.integration.registration",
]
PROMPT = token_ids(1, 8, seed=5)[0]

# TORCH_DEVICE_BACKEND_AUTOLOAD, and what a process imports first. When torch calls us, the first
# import of transformers is half done; here in the module that we wait for.
FIRST_IMPORTS = [
    ("1", "from transformers import PreTrainedModel"),
    ("0", "import deltamix_hf"),
]

USE = """
import sys
{first}
assert sorted(m for m in sys.modules if m.split(".")[0] == "deltamix_hf") == {light}
import json, transformers
transformers.logging.disable_progress_bar()
base, repo, prompt = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
assert "deltamix_hf.integration.model_methods" not in sys.modules
model.load_delta(repo, "tenant")
pipe = transformers.pipeline("text-generation", model=repo, device="cpu")
said = pipe(prompt, max_new_tokens=6, do_sample=False, return_full_text=False)
loaded = transformers.AutoModel.from_pretrained(repo)
packed = type(loaded.embed_tokens).__name__
print(json.dumps([said[0]["generated_text"], packed, model.active_deltas]))
"""


def fresh(code: str, *arguments: object, autoload: str = "1") -> list:
    """What `code` prints as JSON at last, run by another Python process."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload,
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def repo(delta, copied) -> Path:
    """A delta repo with a tokenizer."""
    folder = copied(delta("llama").folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def answer(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(PROMPT[None], max_new_tokens=6, do_sample=False)[0, len(PROMPT) :]
    return make_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("autoload", "first"), FIRST_IMPORTS)
def test_a_delta_repo_loads(repo, delta, autoload, first):
    base = delta("llama").pair.base
    expected = answer(repo)
    assert expected != answer(base)  # else loading the base alone would do
    code = USE.format(first=first, light=LIGHT)
    found = fresh(code, base, repo, text_of(PROMPT), autoload=autoload)
    assert found == [expected, "DeltaEmbedding", ["tenant"]]


def test_who_imports_torch_alone_gets_small_modules_only():
    names = '[m for m in sys.modules if m.split(".")[0] in ("deltamix_hf", "transformers")]'
    assert fresh(f"import json, sys, torch; print(json.dumps(sorted({names})))") == LIGHT


def test_our_import_and_the_help_of_the_command_are_light():
    heavy = '[m for m in ("torch", "transformers", "numpy", "matplotlib") if m in sys.modules]'
    code = f"import json, sys, deltamix_hf, deltamix_hf.cli; print(json.dumps({heavy}))"
    assert fresh(code) == []
