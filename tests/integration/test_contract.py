"""The same promises for every architecture: compress, save, reload, run, offload, turn dense.

Models are made from their config classes (`architectures.py`). Those of `tiny_pairs.FAMILIES` are
tested in depth elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, logits
from tiny_pairs import fine_tune, make_config, quick, relative, weight_bytes
from torch import nn

from deltamix_hf import DeltaMixConfig
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.nn.layers import delta_modules


@dataclass(frozen=True)
class Made:
    """Folder of base, fine-tune and delta; logits of the compressed model and the fine-tune."""

    name: str
    cls: Any
    folder: Path
    packed: torch.Tensor
    tuned: torch.Tensor

    def load(self, name: str, **options: Any) -> Any:
        return self.cls.from_pretrained(self.folder / name, **options)


def make(name: str, folder: Path, tokens: int = 0, **options: Any) -> Made:
    """`tokens`: how many more than the base's the fine-tune has."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    model.save_pretrained(folder / "base")
    if tokens:
        rows = len(model.get_input_embeddings().weight) + tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    config = make_config(folder / "base", **options)
    packed = type(model).from_pretrained(folder / "tuned", quantization_config=config)
    packed.save_pretrained(folder / "delta")
    packed.save_pretrained(folder / "shards", max_shard_size="10KB")
    return Made(name, type(model), folder, logits(packed), logits(model))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, tmp_path_factory) -> Made:
    ratio, method = ARCHITECTURES[request.param].ratio, "deltamix-kl"
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder, ratio=ratio, method=method, **quick(method))


def test_reload_gives_bit_equal_logits(made):
    assert torch.equal(logits(made.load("delta")), made.packed)
    base = logits(made.load("base"))
    assert relative(made.packed, made.tuned) < 0.5 * relative(base, made.tuned)


def test_shards_are_the_same_repo(made):
    assert len(list((made.folder / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(made.load("shards")), made.packed)


def blocks(module: nn.Module, whole: set[str], prefix: str = "") -> Iterator[str]:
    """Names of the parts that a device map may put in different places."""
    for name, child in module.named_children():
        name = f"{prefix}{name}"
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if own or not list(child.children()) or type(child).__name__ in whole:
            yield name
        else:
            yield from blocks(child, whole, f"{name}.")


@pytest.mark.parametrize("repo", ["delta", "shards"])
@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_parts_on_disk(made, tmp_path, repo, first):
    """Every other part of the model, one way and the other; what is tied in one place."""
    model = ARCHITECTURES[made.name].build()
    names = list(blocks(model, set(model._no_split_modules or [])))
    other = {"cpu": "disk", "disk": "cpu"}[first]
    places = {name: (first, other)[i % 2] for i, name in enumerate(names)}
    for twin, source in model.all_tied_weights_keys.items():
        there = next(places[name] for name in names if source.startswith(f"{name}."))
        places[next(name for name in names if twin.startswith(f"{name}."))] = there
    loaded = made.load(repo, device_map=places, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    # layers that are not all in memory do not share one product: another order of additions
    assert relative(logits(loaded), made.packed) < 1e-6


def test_less_memory_than_the_model_takes(made, tmp_path):
    """accelerate chooses what stays, counting packed tensors too."""
    size = made.load("delta").get_memory_footprint()
    options = {"device_map": "auto", "max_memory": {"cpu": size // 2}}
    loaded = made.load("delta", **options, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert relative(logits(loaded), made.packed) < 1e-6


def test_dense_again_is_the_same_within_rounding(made):
    dense = made.load("delta", quantization_config=DeltaMixConfig(dequantize=True))
    assert not delta_modules(dense)
    assert relative(logits(dense), made.packed) < 1e-5


def test_bytes_are_the_promised_ones(made):
    report = inspect_repo(made.folder / "delta")
    assert report.size.total == weight_bytes(made.folder / "delta")
    assert report.size.ratio <= ARCHITECTURES[made.name].ratio
    assert len(report.matrices) >= 6


def test_beside_the_base(made):
    model = made.load("base")
    plain = logits(model)
    model.load_delta(made.folder / "delta", "one")
    assert relative(logits(model), made.packed) < 1e-5
    with model.disable_deltas():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("tokens", [5, -40])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_more_and_fewer_tokens(name, tokens, tmp_path):
    made = make(name, tmp_path, tokens, ratio=0.95, method="delta-come", bf16_overlay=True)
    assert torch.equal(logits(made.load("delta")), made.packed)
    assert torch.equal(logits(made.load("shards")), made.packed)
    assert made.packed.shape[-1] == 256 + tokens
    assert relative(made.packed, made.tuned) < 0.1
