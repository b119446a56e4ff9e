"""Statistics block by block are those of the whole model, bit for bit."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tiny_pairs import FAMILIES, calibration_ids, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltamix_hf.calibration.block_chain import BlockChain, find_blocks
from deltamix_hf.calibration.blockwise import BlockwisePass
from deltamix_hf.calibration.statistics import collect, frozen
from deltamix_hf.errors import DeltaMixError
from deltamix_hf.jobs.resume_store import ResumeStore, TensorList
from deltamix_hf.jobs.workers import Workers
from deltamix_hf.linalg.second_moments import SecondMoment, diagonal

ALONE = Workers()
BATCHES = [token_ids(2, 9, seed=0), token_ids(3, 6, seed=1), calibration_ids()]


def observed(model):
    kinds = nn.Linear | nn.Embedding | Conv1D
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def by_block(model, folder, fisher, workers=ALONE):
    store, modules = ResumeStore(folder, "a"), observed(model)
    (blocks,) = find_blocks(model, list(modules))
    with frozen(model):
        tensor_list = partial(TensorList, store.of(workers.rank))
        chain = BlockChain(model, blocks, BATCHES, tensor_list=tensor_list)
        assert chain.capture() and chain.plain
        return BlockwisePass(chain, modules, fisher, 0, store, workers)


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert"])
def test_the_same_sums(name, fisher, tmp_path, monkeypatch):
    if name == "llama":  # sketches
        rest = SecondMoment.__init__.__defaults__[3:]
        monkeypatch.setattr(SecondMoment.__init__, "__defaults__", (64, 32, 200, *rest))
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    passes = by_block(model, tmp_path, fisher)
    found = passes.found
    expected, scored = collect(model, observed(model), BATCHES, fisher)
    assert passes.scored == scored
    assert found.keys() == expected.keys()
    for module, layer in expected.items():
        for side in ("inputs", "gradients"):
            ours, theirs = getattr(found[module], side), getattr(layer, side)
            assert (ours is None) == (theirs is None)
            if theirs is None or theirs.total is None:
                continue
            assert ours.count == theirs.count
            assert torch.equal(ours.total, theirs.total), (module, side)
            assert torch.equal(diagonal(ours.mean(7)), diagonal(theirs.mean(7)))
        assert (found[module].tokens is None) == (layer.tokens is None)
        if layer.tokens is not None:
            assert torch.equal(found[module].tokens, layer.tokens)


def test_workers_share_the_batches(tmp_path):
    """Inputs add up to those of one worker; gradients are of other draws."""
    torch.manual_seed(0)
    models = [FAMILIES["llama_tied"].build().eval()]
    models.append(copy.deepcopy(models[0]))
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(by_block, model, tmp_path, True, Workers(rank, 2))
            for rank, model in enumerate(models)
        ]
        passes = [job.result(timeout=60) for job in jobs]
    expected, scored = collect(models[0], observed(models[0]), BATCHES, True)
    for made in passes:  # each reads what both have measured
        assert made.scored == scored and made.found.keys() == expected.keys()
        for name, layer in expected.items():
            found = made.found[name]
            if layer.tokens is not None:
                assert torch.equal(found.tokens, layer.tokens)
            else:
                assert found.inputs.count == layer.inputs.count
                torch.testing.assert_close(found.inputs.total, layer.inputs.total)
            ours, theirs = found.gradients.mean(scored), layer.gradients.mean(scored)
            assert float(ours.trace()) == pytest.approx(float(theirs.trace()), rel=0.2)


def test_nan_names_the_block(tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["llama"].build().eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DeltaMixError, match=r"NaN or infinite values at"):
        by_block(model, tmp_path, True)


def test_a_folder_that_was_cleared_meanwhile(tmp_path):
    torch.manual_seed(0)
    found = by_block(FAMILIES["llama"].build().eval(), tmp_path, True)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DeltaMixError, match="was changed while it was in use"):
        found.found["lm_head"]
