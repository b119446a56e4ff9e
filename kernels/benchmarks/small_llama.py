"""A small llama, fine-tunes of it and their deltas, for checks of the library on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

NAMES = ("one", "two", "three")
MIXED = ["one", None, "three", "one"]
# Relative error of logits, RMS, after the rounding of activations in every layer.
CLOSE = {"bfloat16": 4e-2, "float16": 6e-3, "float32": 1e-3}
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}


@dataclass
class Place:
    """Where the models are, and on which device they run; one for a process."""

    folder: Path = Path()
    device: str = "cpu"


here = Place()


def pair(sizes: dict[str, int]) -> Iterator[dict]:
    """A base and its fine-tunes: every matrix moves by a tenth, along a falling spectrum."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": sizes["hidden_size"] // 16, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=2048, initializer_range=0.05)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(here.folder / "base")
    kept = {name: p.clone() for name, p in model.named_parameters()}
    for seed, name in enumerate(NAMES, 1):
        random = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim < 2:
                parameter.copy_(kept[key].float() + 0.02 * noise)
                continue
            m, n = parameter.shape
            fall = 1 / torch.arange(1, min(m, n) + 1)
            delta = torch.randn(m, len(fall), generator=random) * fall
            delta = delta @ torch.randn(len(fall), n, generator=random)
            delta = delta / delta.norm() + 0.05 * noise / noise.norm()
            old = kept[key].float()
            parameter.copy_(old + 0.1 * old.norm() * delta)
        model.save_pretrained(here.folder / f"{name}-tuned")
    yield {"parameters": sum(p.numel() for p in model.parameters())}


def ids(rows: int = 2, length: int = 8, seed: int = 0):
    import torch

    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (rows, length), generator=random)


def load(folder: str, device: str | None = None, dtype: str = "bfloat16", **options):
    import torch
    from transformers import AutoModelForCausalLM

    import deltamix_hf  # registers the method where no entry point is installed

    assert deltamix_hf.__version__
    device = device or here.device
    return AutoModelForCausalLM.from_pretrained(
        here.folder / folder, dtype=getattr(torch, dtype), device_map=device, **options
    ).eval()


def with_deltas(names=NAMES):
    model = load("base")
    for name in names:
        model.load_delta(here.folder / name, name)
    return model


def subject(many_deltas: bool):
    return with_deltas() if many_deltas else load("one")


def using(model, names, many_deltas: bool):
    """Context manager: these deltas, where the model has several: asking it would change it."""
    return model.use_deltas(names) if many_deltas else nullcontext()


def logits(model, tokens, **options):
    return model(tokens.to(model.device), **options).logits.float().cpu()


def expected(name: str | None, tokens):
    """Float32 on the CPU, by the reference."""
    return logits(load(name or "base", "cpu", "float32"), tokens)


def distance(found, right) -> float:
    found, right = found.double(), right.double()
    error = float((found - right).norm() / right.norm())
    return float(f"{error:.3g}") if error == error else float("inf")


def near(found, right, dtype: str = "bfloat16") -> dict:
    error = distance(found, right)
    return {"ok": error <= CLOSE[dtype], "error": error}
