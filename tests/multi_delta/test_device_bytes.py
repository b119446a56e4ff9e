"""What a delta is said to take on the device is what is there, codes in the kernels' order too."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE
from many_deltas import NAMES, loaded
from tiny_pairs import logits, token_ids
from torch.utils._pytree import tree_leaves

from deltamix_hf.checkpoint.delta_repo import StoredDelta
from deltamix_hf.multi_delta.grouped import FactorTable
from deltamix_hf.multi_delta.manager import manager_of
from deltamix_hf.ops.dispatch import TRITON, VARIABLE

pytestmark = pytest.mark.untraced


def half(family, names=NAMES):
    """The base in float16, which the kernels know, with deltas loaded beside it."""
    model = family.pair.load(family.pair.base).to(DEVICE, torch.float16)
    for name in names:
        model.load_delta(family.repos[name], name)
    return model


def placed(model, name):
    """Bytes of what modules and tables hold of a delta, all that is shared once."""
    found, slot = [], model.dm_deltas.router.slots[name]
    for deltas in [m.dm_row_deltas for m in model.dm_deltas._modules[name]]:
        packed = deltas.packed.get(name)
        found += [packed.tensors if packed else (), deltas.overlay.get(name, ())]
        if isinstance(deltas.table, FactorTable):
            found += deltas.table.table._kept.get(slot, ())
    return sum({t.data_ptr(): t.nbytes for t in tree_leaves(found)}.values())


def test_by_kernels(one_block, monkeypatch):
    """Before the first use and after it, which makes the tables; min-max grids are in none."""
    monkeypatch.setenv(VARIABLE, TRITON)
    model = half(one_block)
    sizes = model.list_deltas()
    for names in (["one", "three", None], "two"):
        logits(model, token_ids(3, 2).to(DEVICE), delta_names=names)
    assert model.list_deltas() == model.delta_memory().resident == sizes
    assert sizes == {name: placed(model, name) for name in NAMES}
    pool = model.dm_deltas.pool
    assert sizes["two"] <= pool.entries["two"].nbytes
    assert sizes["one"] > 1.5 * pool.entries["one"].nbytes


def test_room_for_two(one_block, monkeypatch):
    """A budget of list_deltas: for the delta of all calls, which stays, and another."""
    monkeypatch.setenv(VARIABLE, TRITON)
    model = half(one_block)
    size = max(model.list_deltas().values())
    model.set_delta_memory(budget_bytes=2 * size, host_bytes=4 * size)
    for name in (*NAMES, *NAMES):
        with model.use_deltas(name):
            resident = model.delta_memory().resident
        assert {"one", name} <= resident.keys() and sum(resident.values()) <= 2 * size


def test_moved_to_where_kernels_run(one_block, monkeypatch):
    """The figures are those of the device and dtype that the model now has."""
    model = loaded(one_block)
    before = model.list_deltas()
    monkeypatch.setenv(VARIABLE, TRITON)
    assert model.list_deltas() == before  # no table takes float32
    after = model.to(DEVICE, torch.float16).list_deltas()
    assert after["one"] > before["one"] and model.delta_memory().resident == after


def test_whole_tensors_once(pair, monkeypatch):
    """In the base's dtype, shared by tied modules, and in no table."""
    monkeypatch.setenv(VARIABLE, TRITON)
    tied = pair("llama_tied")
    model = tied.load(tied.base).to(DEVICE, torch.float16)
    weight = model.get_input_embeddings().weight
    stored = StoredDelta({}, {"model.embed_tokens.weight": weight.float() + 1}, {}, "here")
    manager_of(model).pool.add("whole", stored, None)
    assert model.list_deltas() == {"whole": weight.nbytes} == {"whole": placed(model, "whole")}
