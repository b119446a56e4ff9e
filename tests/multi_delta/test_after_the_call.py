"""What happens beside or after a call: recomputation, threads that come first, new embeddings."""

from __future__ import annotations

import threading

import pytest
import torch
from many_deltas import CLOSE, NAMES, loaded
from tiny_pairs import logits, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltamix_hf import DeltaMixError

NAMED = ["two", None, "three"]


@pytest.fixture(scope="module", params=["llama_tied", "bert"])
def family(request, make_family):
    return make_family(request.param)


def gradient(model, names):
    """Of the embeddings, by a backward pass while other deltas are in force."""
    torch.manual_seed(0)  # dropout
    inputs = model.get_input_embeddings()(token_ids(3, 7)).detach().requires_grad_()
    found = model(inputs_embeds=inputs, **({} if names is None else {"delta_names": names}))
    with model.use_deltas("one"):
        found.logits.float().square().mean().backward()
    return inputs.grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("names", [NAMED, None], ids=["named", "set"])
def test_what_is_recomputed_has_the_deltas_of_its_call(family, reentrant, names):
    model, kwargs = loaded(family).train(), {"use_reentrant": reentrant}
    model.set_delta("two")
    expected = gradient(model, names)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert torch.equal(gradient(model, names), expected)
    model = family.pair.load(family.pair.base).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for name, repo in family.repos.items():  # after it was enabled
        model.load_delta(repo, name)
    model.set_delta("two")
    assert torch.equal(gradient(model, names), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_by_others_is_refused(family, reentrant):
    model = loaded(family).train()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    with model.use_deltas(NAMED):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(DeltaMixError, match="use gradient_checkpointing_enable"):
        y.sum().backward()


@pytest.mark.parametrize("own", [False, True], ids=["base", "delta repo"])
def test_threads_that_come_first_share_one_set_of_deltas(family, own):
    for _ in range(4):
        model = family.pair.load(family.repos["one"] if own else family.pair.base)
        start, errors = threading.Barrier(4), []

        def load(i, model=model, start=start, errors=errors):
            start.wait()
            try:
                model.load_delta(family.repos[NAMES[i % 3]], f"d{i}")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = {f"d{i}" for i in range(4)} | ({"default"} if own else set())
        assert not errors and set(model.list_deltas()) == wanted
        assert len(model.active_deltas) == 1
        ids = token_ids(2, 7)
        found = logits(model, ids, delta_names=["d1", None])
        assert torch.equal(found[1], family.alone(None, ids)[1])
        torch.testing.assert_close(found[0], family.alone("two", ids)[0], **CLOSE)


def test_embeddings_stay_as_long_as_deltas_do(family):
    model, ids = loaded(family), token_ids(2, 7)
    expected = logits(model, ids)
    rows, width = model.get_input_embeddings().weight.shape
    assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
    assert model.resize_token_embeddings(new_num_tokens=rows) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.set_input_embeddings(model.get_input_embeddings())
    changes = [
        lambda: model.resize_token_embeddings(rows + 1),
        lambda: model.resize_token_embeddings(pad_to_multiple_of=rows + 3),
        lambda: model.set_input_embeddings(nn.Embedding(rows, width)),
        lambda: model.set_output_embeddings(nn.Linear(width, rows)),
    ]
    for change in changes:
        with pytest.raises(DeltaMixError, match="would change what the loaded deltas are for"):
            change()
    assert torch.equal(logits(model, ids), expected)
    for name in NAMES:
        model.delete_delta(name)
    model.resize_token_embeddings(rows + 1)
    assert model.get_input_embeddings().weight.shape[0] == rows + 1
    with pytest.raises(DeltaMixError, match="resized"):
        model.load_delta(family.repos["one"], "one")
