"""`lm_eval --model hf --model_args pretrained=<delta repo>`, for real, on a task of our own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pairs import make_tokenizer, text_of, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamix_hf import DeltaMixConfig

TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{target}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
  - metric: acc
    aggregation: mean
"""
CONTEXTS = token_ids(8, 6, seed=5)


@torch.no_grad()
def next_words(model: PreTrainedModel) -> torch.Tensor:
    return model(CONTEXTS).logits[:, -1].argmax(-1)


@torch.no_grad()
def scores(model: PreTrainedModel, targets: torch.Tensor) -> tuple[float, float]:
    """Perplexity and accuracy, from the logits."""
    loglikelihood = model(CONTEXTS).logits[:, -1].double().log_softmax(-1)
    found = loglikelihood.gather(1, targets[:, None])
    right = loglikelihood.argmax(-1) == targets
    return math.exp(-found.mean()), right.double().mean().item()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_lm_eval_scores_the_delta(delta, copied, tmp_path):
    source = delta("llama")
    repo = copied(source.folder)
    make_tokenizer().save_pretrained(repo)
    dense = AutoModelForCausalLM.from_pretrained(
        repo, quantization_config=DeltaMixConfig(dequantize=True)
    )
    targets = next_words(dense)
    targets[::2] = token_ids(1, 4, seed=6)[0]  # half of them wrong
    rows = zip(CONTEXTS, targets, strict=True)
    lines = [{"context": text_of(row), "target": text_of(word[None])} for row, word in rows]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "words.yaml").write_text(TASK.format(file=tmp_path / "words.jsonl"))

    found = _lm_eval(repo, tmp_path)
    perplexity, accuracy = scores(dense, targets)
    assert found["perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    assert found["acc,none"] == accuracy == 0.5
    base = AutoModelForCausalLM.from_pretrained(source.pair.base)
    assert scores(base, targets)[0] != pytest.approx(perplexity, rel=5e-4)


# The command's own call, but without an index of all its tasks and 100000 draws for an error bar.
SCRIPT = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
model = {"model": "hf", "model_args": f"pretrained={sys.argv[1]}", "device": "cpu"}
found = lm_eval.simple_evaluate(
    **model, tasks=["words"], batch_size="4", task_manager=tasks, bootstrap_iters=0
)
assert "deltamix_hf.integration.quantizer" in sys.modules
print(json.dumps({k: v for k, v in found["results"]["words"].items() if type(v) is float}))
"""


def _lm_eval(repo: Path, folder: Path) -> dict[str, float]:
    """Score in a process that imports nothing of ours by itself."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repo), str(folder)],
        env={**os.environ, **offline, "HF_HOME": str(folder / "home")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
