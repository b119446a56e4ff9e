"""The estimate of a job bounds what the job takes; the process alone is most of it here."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltamix_hf.compression.memory_estimate import estimate_memory

# Prints the estimate, and peaks of the process and of the work folder.
JOB = r"""
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from deltamix_hf import DeltaMixConfig
from deltamix_hf.compression import model as module
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.jobs.resume_store import ResumeStore
from deltamix_hf.method import METHODS

torch.set_num_threads(1)
folder, said, disk = Path(sys.argv[1]), [], [0]
estimate, forget = module.estimate_memory, ResumeStore.forget

def noted(*arguments):
    said.append(estimate(*arguments))
    return said[0]

def measured(self, name):
    disk.append(sum(file.stat().st_size for file in self.folder.iterdir()))
    forget(self, name)

module.estimate_memory, ResumeStore.forget = noted, measured
ids = torch.randint(8000, (2, 512), generator=torch.Generator().manual_seed(0))
method = replace(METHODS["deltamix-kl"], tune_steps=3)  # as much memory as 40 take
options = {"ratio": 1 / 16, "allocation_gap": 1.0, "calibration": ids}
config = DeltaMixConfig(folder / "base", method=method, **options)
compress_streaming(folder / "tuned", folder / "out", config)
peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([*said[0], peak, max(disk)]))
"""


def model_of(blocks=1, hidden=128):
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes, **heads, dtype="float32"))


def test_it_bounds_a_real_job(tmp_path):
    torch.manual_seed(0)
    model = model_of()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    command = [sys.executable, "-c", JOB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    memory, disk, peak, most = json.loads(done.stdout.splitlines()[-1])
    print(memory, peak, disk, most)
    assert 0.6 * memory < peak < memory
    assert most < disk


def test_what_it_depends_on():
    model = model_of(2)
    targets = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    batches = [torch.zeros(4, 512, dtype=torch.int64)] * 2
    whole = estimate_memory(model, targets, batches, True, 10**6)
    free = estimate_memory(model, targets, [], True, 10**6)
    assert free[0] < whole[0] and free[1] == 2 * 10**6
    more = estimate_memory(model, targets, batches * 2, True, 10**6)
    assert more[0] == whole[0]
    assert more[1] - whole[1] == 2 * 4 * 512 * 128 * 4 * (2 + 16)  # hidden states
    longer = estimate_memory(model, targets, [torch.zeros(8, 512)], True, 10**6)
    assert longer[0] > whole[0] and longer[1] == whole[1]
