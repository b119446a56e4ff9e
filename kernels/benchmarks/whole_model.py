"""A Llama-3-8B of random weights with deltas, as the library runs it on a GPU.

    python kernels/benchmarks/whole_model.py [--blocks 32]

Tokens a second of decoding with a static cache, in a CUDA graph and eager, a prefill, and memory as
torch counts it: of the base alone, of one delta by itself, and of 16 rows over 1, 4 and 16 deltas.
Then how long a delta takes from its files and from host memory. A delta repo of random codes is
written once and loaded under 16 names; the base's file is zeros that take no room on a disk, read
only for the fingerprint of one tensor. One JSON line a figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import last_lines, tell
from factors import layer_factors
from safetensors.torch import save_file
from shapes import MODELS, Linear
from timing import DEVICE, spread, synchronize, time_eager, time_graph
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from deltamix_hf import DeltaMixConfig
from deltamix_hf.nn.layers import attach_with_ties
from deltamix_hf.nn.shared_input import link_shared_inputs
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.storage.headers import fingerprints, read_headers

ROOM = 64  # tokens that the cache takes beyond the context: as many as are decoded for one figure
TOLERANCE = 4e-2  # of the norm of logits, after the rounding of activations in every layer


@dataclass(frozen=True)
class Size:
    linears: list[Linear]
    blocks: int
    vocabulary: int
    head: int
    context: int  # tokens before those that are decoded
    prefill: int
    deltas: tuple[int, ...]  # in a batch of as many rows as the last of them

    @property
    def layers(self) -> Iterator[tuple[str, Linear]]:
        """Names and shapes of all linear layers of the blocks."""
        for block in range(self.blocks):
            for linear in self.linears:
                part = "mlp" if linear.reads in ("mlp", "gated") else "self_attn"
                yield f"model.layers.{block}.{part}.{linear.name}", linear

    def deltas_of(self, seed: int = 0) -> Iterator[tuple[str, PackedDelta]]:
        for i, (name, linear) in enumerate(self.layers):
            yield name, layer_factors(linear, DEVICE, 1000 * seed + i)


def make_base(size: Size, folder: Path) -> PreTrainedModel:
    """The same random weights each time; `folder` is where the model says it is from."""
    by_name = {linear.name: linear for linear in size.linears}
    config = LlamaConfig(
        hidden_size=by_name["q_proj"].n,
        intermediate_size=by_name["gate_proj"].m,
        num_attention_heads=by_name["q_proj"].m // size.head,
        num_key_value_heads=by_name["k_proj"].m // size.head,
        num_hidden_layers=size.blocks,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        name_or_path=str(folder),
    )
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def write_hollow(model: PreTrainedModel, folder: Path) -> None:
    """Save a checkpoint of the model's names and shapes, whose data is a hole in the file."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    model.config.save_pretrained(folder)


def write_delta(model: PreTrainedModel, size: Size, base: Path, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, delta in size.deltas_of():
        names = delta.names(name)
        tensors |= {names[part]: tensor.cpu() for part, tensor in delta.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    infos, known = read_headers([base / "model.safetensors"]), "model.norm.weight"
    config = DeltaMixConfig(
        base_model=base, base_fingerprints=fingerprints({known: infos[known]})
    ).to_dict()
    settings = json.loads(model.config.to_json_string(use_diff=False))
    text = json.dumps({**settings, "quantization_config": config})
    (folder / "config.json").write_text(text, encoding="utf-8")


def ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    random = torch.Generator().manual_seed(rows + length)
    return torch.randint(model.config.vocab_size, (rows, length), generator=random).to(DEVICE)


def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Tell what `measure` finds, or how it failed."""
    try:
        tell(**row, **measure())
    except Exception as error:
        tell(**row, ok=False, error=last_lines(error))


def figures(model: PreTrainedModel, size: Size, rows: int, names: Any = None, **row: Any) -> None:
    """Decoding and prefill of `rows` rows by the deltas `names`; None: whatever the model runs."""

    def step() -> Callable[[], Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=size.context + ROOM)
        model(ids(model, rows, size.context), past_key_values=cache, logits_to_keep=1)
        token = ids(model, rows, 1)
        # without a mask one token attends to all the cache: nothing is read back from the device
        return lambda: model(token, past_key_values=cache).logits

    def graph() -> dict[str, Any]:
        run = step()
        found = time_graph(lambda _: run(), 1)
        return {"tokens/s": round(rows / statistics.median(found), 1), **spread(found)}

    def eager() -> dict[str, Any]:
        found = time_eager(step())
        return {"tokens/s": round(rows / statistics.median(found), 1), **spread(found)}

    def prefill() -> dict[str, Any]:
        tokens = ids(model, rows, size.prefill // rows)
        found = time_eager(lambda: model(tokens, use_cache=False, logits_to_keep=1), 3)
        return {"tokens/s": round(tokens.numel() / statistics.median(found)), **spread(found)}

    row = {"rows": rows, **row}
    with nullcontext() if names is None else model.use_deltas(names):
        attempt({"what": "decode in a graph", **row}, graph)
        attempt({"what": "decode eager", **row}, eager)
        attempt({"what": "prefill", **row}, prefill)
    if DEVICE.type == "cuda":
        tell(what="memory", **row, GB=round(torch.cuda.memory_allocated() / 1e9, 3))


def alone(size: Size, base: Path, repo: Path) -> Tensor:
    """The base, then with a delta of its own; that one's logits of a few tokens."""
    model = make_base(size, base)
    write_hollow(model, base)
    write_delta(model, size, base, repo)
    most = size.deltas[-1]
    for rows in (1, most):
        figures(model, size, rows, deltas=0)
    for name, delta in size.deltas_of():
        attach_with_ties(model, name, delta)
    link_shared_inputs(model)
    for rows in (1, 4, most):
        figures(model, size, rows, deltas="one, by itself")
    return model(ids(model, 2, 4)).logits.float()


def many(size: Size, base: Path, repo: Path, right: Tensor) -> None:
    """Up to 16 deltas on one base; `right` is what the first should give."""
    model, most = make_base(size, base), size.deltas[-1]
    named, spent = [f"delta {i}" for i in range(most)], []
    for count in size.deltas:
        for name in named[len(spent) : count]:
            started = time.perf_counter()
            model.load_delta(repo, name)
            synchronize()
            spent.append(time.perf_counter() - started)
        names = [named[i * count // most] for i in range(most)]
        figures(model, size, most, names, deltas=count)
    nbytes = (repo / "model.safetensors").stat().st_size
    median = statistics.median(spent)
    tell(what="load from files", MB=round(nbytes / 1e6), seconds=round(median, 3), first=spent[0])
    found = model(ids(model, 2, 4), delta_names=named[0]).logits.float()
    error = float((found - right).norm() / right.norm())
    tell(what="one of many and by itself", ok=error <= TOLERANCE, error=error)
    row = {"what": "hot load", "MB": round(nbytes / 1e6)}
    attempt(row, lambda: hot_load(model, named, nbytes))


def hot_load(model: PreTrainedModel, named: list[str], nbytes: int) -> dict[str, Any]:
    """Seconds that a delta of `nbytes` takes from host memory, where it was moved to make room."""
    placed, found = model.list_deltas()[named[0]], []
    model.set_delta(named[0])
    model.set_delta_memory(budget_bytes=2 * placed, host_bytes=3 * nbytes)
    for name in 3 * named[:3]:
        synchronize()
        started = time.perf_counter()
        model.set_delta(name)
        synchronize()
        found.append(time.perf_counter() - started)
    median = statistics.median(found[3:])  # the first three came from files
    return {"ms": round(1e3 * median, 1), "GBps": round(nbytes / median / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a smaller model, on a CPU")
    options = parser.parse_args()
    size = Size(MODELS["Llama-3-8B"], options.blocks, 128256, 128, 128, 2048, (1, 4, 16))
    if options.tiny:
        size = Size(MODELS["tiny"], 2, 256, 16, 4, 12, (1, 2, 4))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        base, repo = Path(folder) / "base", Path(folder) / "delta"
        base.mkdir()
        repo.mkdir()
        right = alone(size, base, repo)
        gc.collect()  # the model is in circles of references
        many(size, base, repo, right)


if __name__ == "__main__":
    main()
