"""Peak memory and seconds by stage of compressing a model that is never whole in memory.

    python examples/bench_streaming.py make /tmp/pair --blocks 4
    python examples/bench_streaming.py run /tmp/pair --tokens 4096
    torchrun --nproc-per-node 2 examples/bench_streaming.py run /tmp/pair --tokens 4096

`make` writes a base and a fine-tune of the shape of a 1B, 7B or 70B llama, of fewer blocks, in
shards of one block each: random weights of the usual size, and a delta of 1 % of their norm whose
singular values fall as i^-0.5. `run` compresses it to 1/16 by `compress_streaming`, and says what
whole models of these shapes would take at the same speed: every stage times the ratio of what it
does (GROWS), for as many tokens.
"""

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads spin

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.utils import logging

from deltamix_hf import METHODS, DeltaMixConfig
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.jobs.workers import Workers

SHAPES = {  # hidden size, in the MLP, heads, key/value heads, blocks, vocabulary
    "1B": (2048, 8192, 32, 8, 16, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "70B": (8192, 28672, 64, 8, 80, 32000),
}
RELATIVE, DECAY, RANKS = 0.01, 0.5, 512

# With the multiplications of decompositions, or the ranks to choose for; all else with the weights.
GROWS = {
    **dict.fromkeys(("spectra", "SVD", "quantization"), lambda m, n: m * n * min(m, n)),
    **dict.fromkeys(("allocation", "HiGHS"), min),
}


def config_of(shape: str, blocks: int, hidden: int | None) -> LlamaConfig:
    size, feed, heads, shared, _, vocabulary = SHAPES[shape]
    if hidden:  # smaller, to try the script out
        feed, vocabulary = feed * hidden // size, 1000
        heads, shared, size = heads * hidden // size or 1, shared * hidden // size or 1, hidden
    return LlamaConfig(
        hidden_size=size,
        intermediate_size=feed,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def shapes_of(config: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shard -> tensor -> shape."""
    d, feed = config.hidden_size, config.intermediate_size
    shared = config.num_key_value_heads * d // config.num_attention_heads
    block = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (shared, d),
        "self_attn.v_proj": (shared, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (feed, d),
        "mlp.up_proj": (feed, d),
        "mlp.down_proj": (d, feed),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shards = {
        f"block{i}": {f"model.layers.{i}.{n}.weight": s for n, s in block.items()}
        for i in range(config.num_hidden_layers)
    }
    table = (config.vocab_size, d)
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": (d,), "lm_head.weight": table}
    return shards | {"ends": ends}


def delta(shape: tuple[int, ...], size: float, random: torch.Generator) -> torch.Tensor:
    """RANKS singular values that fall as i^-DECAY, and noise of as much energy beyond."""
    m, n = shape
    fall = torch.arange(1, RANKS + 1) ** -DECAY
    found = (torch.randn(m, RANKS, generator=random) * fall) @ torch.randn(
        RANKS, n, generator=random
    )
    found /= found.norm()
    noise = torch.randn(m, n, generator=random)
    found += noise.div_(noise.norm())
    return found * (size / 2**0.5)


def make(folder: Path, shape: str, blocks: int, hidden: int | None) -> None:
    config = config_of(shape, blocks, hidden)
    random = torch.Generator().manual_seed(0)
    maps: dict[str, str] = {}
    for kind in ("base", "finetuned"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / kind)
    for shard, tensors in shapes_of(config).items():
        base, tuned = {}, {}
        for name, size in tensors.items():
            if len(size) == 1:
                base[name] = torch.ones(size, dtype=torch.bfloat16)
                noise = torch.randn(size, generator=random)
                tuned[name] = (base[name].float() + 0.01 * noise).bfloat16()
                continue
            weight = torch.randn(size, generator=random) / config.hidden_size**0.5
            base[name] = weight.bfloat16()
            weight += delta(size, RELATIVE * float(weight.norm()), random)
            tuned[name] = weight.bfloat16()
        file = f"model-{shard}.safetensors"
        maps |= dict.fromkeys(tensors, file)
        save_file(base, folder / "base" / file, metadata={"format": "pt"})
        save_file(tuned, folder / "finetuned" / file, metadata={"format": "pt"})
        print("written:", shard, flush=True)
    for kind in ("base", "finetuned"):
        index = json.dumps({"metadata": {}, "weight_map": maps})
        (folder / kind / "model.safetensors.index.json").write_text(index)


def run(
    folder: Path,
    method: str,
    tokens: int,
    length: int,
    free: bool,
    tune_steps: int | None,
    device: str,
) -> None:
    logging.disable_progress_bar()
    workers = Workers.launched()
    loaded = json.loads((folder / "finetuned" / "config.json").read_text())
    blocks, vocabulary = loaded["num_hidden_layers"], loaded["vocab_size"]
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (max(1, tokens // length), length), generator=random)
    chosen = METHODS[method]
    if free:  # the weights alone
        chosen = replace(chosen, fisher=False, tune_steps=0)
    elif tune_steps is not None:
        chosen = replace(chosen, tune_steps=tune_steps)
    before, output = peak(), folder / "delta"
    config = DeltaMixConfig(folder / "base", method=chosen, calibration=None if free else ids)
    started = time.perf_counter()
    model = compress_streaming(folder / "finetuned", output, config, device)
    spent = time.perf_counter() - started
    if workers.rank:
        return
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    shutil.rmtree(output)
    print(
        f"{method}, {'weights alone' if free else f'{tokens} tokens'}, {blocks} blocks of "
        f"{loaded['hidden_size']} x {loaded['intermediate_size']}, {device}, "
        f"{workers.size} processes of {torch.get_num_threads()} threads: {spent:.0f} s, "
        f"{written / 1e6:.0f} MB written"
    )
    print(f"peak memory {peak():.2f} GB, before it began {before:.2f} GB")
    print(f"  {'seconds':14} {'here':>8}" + "".join(f" {shape:>9}" for shape in SHAPES))
    seconds = dict(sorted(model.hf_quantizer.seconds.items(), key=lambda item: -item[1]))
    whole = {shape: extrapolated(seconds, loaded, shape) for shape in SHAPES}
    for stage, here in seconds.items():
        print(
            f"  {stage:14} {here:8.1f}"
            + "".join(f" {found[stage]:9.0f}" for found in whole.values())
        )
    totals = [sum(found.values()) for found in (seconds, *whole.values())]
    print(f"  {'all':14} {totals[0]:8.1f}" + "".join(f" {total:9.0f}" for total in totals[1:]))


def extrapolated(seconds: dict[str, float], measured: dict, shape: str) -> dict[str, float]:
    """Seconds of every stage for a whole model of `shape` at the same speed."""

    def work(config: LlamaConfig, grows: Callable[[int, int], int]) -> int:
        sizes = [size for shard in shapes_of(config).values() for size in shard.values()]
        return sum(grows(*size) for size in sizes if len(size) == 2)

    here, there = LlamaConfig(**measured), config_of(shape, SHAPES[shape][4], None)
    found = {}
    for stage, spent in seconds.items():
        grows = GROWS.get(stage, lambda m, n: m * n)
        found[stage] = spent * work(there, grows) / work(here, grows)
    return found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, help="a smaller one of the same proportions")
    parser.add_argument("--method", default="deltamix-kl")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--data-free", action="store_true")
    parser.add_argument(
        "--tune-steps", type=int, help="of the scales; the method's own if not given"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.job == "make":
        shutil.rmtree(options.folder, ignore_errors=True)
        make(options.folder, options.shape, options.blocks, options.hidden)
    else:
        run(
            options.folder,
            options.method,
            options.tokens,
            options.length,
            options.data_free,
            options.tune_steps,
            options.device,
        )


if __name__ == "__main__":
    main()
