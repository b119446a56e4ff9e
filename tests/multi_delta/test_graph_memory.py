"""Compiled code leaves no tensor behind in the memory of a CUDA graph.

`torch.compile(mode="reduce-overhead")` warms up with all that its thread allocates in the graph's
pool, and refuses what outlives the call and is no output. Watched on a CPU too: tensors are seen
where they are made, other threads' are not.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import deltamix_kernels
import pytest
import torch
from kernel_cases import DEVICE
from many_deltas import NAMES, loaded
from tiny_pairs import logits, token_ids
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltamix_hf.nn.delta_module import DeltaModule
from deltamix_hf.nn.shared_input import SharedInput
from deltamix_hf.ops.dispatch import REFERENCE, TRITON, VARIABLE

pytestmark = pytest.mark.untraced

MIXED = ["one", None, "three"]


class Made(TorchDispatchMode):
    """Notes the memory that operations of this thread make."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        lifted = function is torch.ops.aten.lift_fresh.default  # the end of torch.tensor(...)
        known = set() if lifted else {s._cdata for s in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in known:
                self.made[storage._cdata] = StorageWeakRef(storage)
        return result

    def alive(self) -> int:
        gc.collect()
        return sum(not storage.expired() for storage in self.made.values())


def storages(values):
    leaves = tree_leaves(values)
    tensors = [t.untyped_storage() for t in leaves if isinstance(t, torch.Tensor)]
    return tensors + [s for s in leaves if isinstance(s, torch.UntypedStorage)]


@pytest.fixture
def made(monkeypatch):
    """What the implementations of compiled ops make; `persistent` does as on a GPU."""

    def persistent(device, make):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.no_grad()(make)).result()

    def watched(plain):
        def run(self, x):
            with found:
                return plain(self, x)

        return run

    found = Made()
    for owner in (deltamix_kernels, deltamix_kernels.layout):
        monkeypatch.setattr(owner, "persistent", persistent)
    for owner, name in ((DeltaModule, "run_compiled"), (SharedInput, "products")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return found


@pytest.fixture
def compiled():
    torch.compiler.reset()

    def compiled(model):
        model.to(DEVICE, torch.float16)
        return torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)

    return compiled


def run(fast, rows=3, seed=0):
    return logits(fast, token_ids(rows, 2, seed).to(DEVICE))


def test_one_delta(one_block, made, compiled, monkeypatch):
    monkeypatch.setenv(VARIABLE, TRITON)
    fast = compiled(one_block.pair.load(one_block.repos["one"]))
    run(fast)
    assert made.made and not made.alive()


def test_a_long_prompt_of_one_delta(one_block, made, monkeypatch):
    """Its factors are dequantized."""
    monkeypatch.setenv(VARIABLE, TRITON)
    model = one_block.pair.load(one_block.repos["one"]).to(DEVICE, torch.float16)
    layer = model.model.layers[0].self_attn.k_proj
    rows = deltamix_kernels.DECODE_ROWS + 1
    with torch.no_grad():
        layer.dm_shared_input.products(layer.weight.new_ones(rows, layer.in_features))
    assert made.made and not made.alive()


def test_many_deltas(one_block, made, compiled, monkeypatch):
    """Never run before: of the delta of all calls, of rows' own, and of another batch."""
    monkeypatch.setenv(VARIABLE, TRITON)
    model = loaded(one_block)
    model.delete_delta("two")  # on a min-max grid, which the kernels' tables do not know
    fast = compiled(model)
    run(fast)
    assert made.made and not made.alive()
    with model.use_deltas(MIXED):
        run(fast)
        assert not made.alive()


@pytest.mark.parametrize("kernel", [TRITON, REFERENCE])
def test_layers_that_take_the_loop(one_block, made, compiled, monkeypatch, kernel):
    """And a batch of rows that were named, then repeated, as beams are."""
    monkeypatch.setenv(VARIABLE, kernel)
    model = loaded(one_block)
    compiled(model)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.ones(6, 2, layer.in_features, dtype=torch.float16, device=DEVICE)
    if kernel == REFERENCE:  # tables for all deltas, of the CPU's memory, are made once a process
        run(model)
        with model.use_deltas(MIXED):
            run(model)
    for names in (*NAMES, ["two", None, "three"]):
        with torch.no_grad(), model.use_deltas(names):
            layer.run_compiled(x)
            assert made.made and not made.alive()
