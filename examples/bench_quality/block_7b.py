"""Seconds by stage to compress one block of a model shaped like Llama-2-7B.

A llama of one block (hidden size 4096, 11008 in the MLP, a small vocabulary), its base random and
its fine-tune 1 % away in every matrix, calibrated on random tokens. Published, for whole 7B models
of 28 blocks on one GPU: DeltaMix 1.2 h, of which 29.4 min in its 0/1 programs, Delta-CoMe 0.4 h, so
154 s, 63 s and 51 s a block.

    python examples/bench_quality/block_7b.py [--method deltamix] [--tokens 8192] [--device cuda]

Seconds so far are printed as JSON lines whenever a stage ends, so that a run that is stopped has
said what it knew.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from deltamix_hf import DeltaMixConfig
from deltamix_hf.jobs.instruments import Stopwatch
from deltamix_hf.method import DEFAULT_METHOD

RELATIVE = 0.01  # ‖ΔW‖ / ‖W_base‖
DECAY = 0.5  # singular values of the delta fall as i^-DECAY
LENGTH = 2048


def make_pair(folder: Path, hidden: int, device: str) -> None:
    """Save `folder`/base and `folder`/finetuned, made on `device`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_attention_heads=max(hidden // 128, 1),
        num_hidden_layers=1,
        vocab_size=4096,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for module in model.model.layers[0].modules():
            if isinstance(module, torch.nn.Linear):
                m, n = module.weight.shape
                k = min(m, n)
                fall = torch.arange(1, k + 1, device=device) ** -DECAY
                left, right = (torch.randn(*s, device=device) for s in ((m, k), (k, n)))
                delta = (left * fall) @ right
                delta *= RELATIVE * module.weight.float().norm() / delta.norm()
                module.weight.copy_(module.weight.float() + delta)
    model.save_pretrained(folder / "finetuned")


def tell(**row: object) -> None:
    print(f"\n{json.dumps(row)}", flush=True)


def tell_stages() -> None:
    """Let stages of compression say how long they have taken when they end."""
    stage, last = Stopwatch.stage, time.perf_counter()

    @contextmanager
    def telling(self: Stopwatch, name: str) -> Iterator[None]:
        nonlocal last
        with stage(self, name):
            yield
        if time.perf_counter() - last > 1:
            last = time.perf_counter()
            tell(ended=name, seconds={s: round(t, 1) for s, t in self.seconds.items()})

    Stopwatch.stage = telling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--tokens", type=int, default=8192, help="for calibration")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows = max(1, options.tokens // LENGTH)
    tell_stages()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        make_pair(Path(folder), options.hidden, options.device)
        tell(ended="making the pair", seconds=round(time.perf_counter() - started, 1))
        config = DeltaMixConfig(
            base_model=f"{folder}/base",
            method=options.method,
            ratio=1 / 16,
            calibration=torch.randint(4096, (rows, min(LENGTH, options.tokens))),
        )
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/finetuned",
            dtype=torch.float32,
            device_map=options.device,
            quantization_config=config,
        )
        spent = time.perf_counter() - started
    found = model.hf_quantizer.seconds
    stages = ", ".join(f"{stage} {part:.0f}" for stage, part in found.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if options.device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 1e9
    tell(
        method=options.method,
        hidden=options.hidden,
        tokens=options.tokens,
        device=options.device,
        total=round(spent, 1),
        stages={stage: round(part, 2) for stage, part in found.items()},
        peak_GB=round(peak, 2),
    )
    print(
        f"{options.method}, one block of hidden size {options.hidden}, {options.tokens} tokens, "
        f"{options.device}, {torch.get_num_threads()} threads: {spent:.0f} s ({stages}), "
        f"peak {peak:.1f} GB"
    )


if __name__ == "__main__":
    main()
