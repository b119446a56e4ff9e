"""Mixed batches on a CPU: all deltas of a layer in one call of the native op."""

from __future__ import annotations

import pytest
import torch
from many_deltas import CLOSE, NAMES, loaded
from tiny_pairs import logits, token_ids
from torch import nn

from deltamix_hf.multi_delta.layers import RoutedDeltas
from deltamix_hf.ops import native
from deltamix_hf.ops.dispatch import NATIVE, REFERENCE, VARIABLE

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
IDS = token_ids(4, 5)
MIXED = ["one", None, "three", "one"]


@pytest.fixture
def calls(monkeypatch):
    """How many deltas each product had, and the outputs of such layers that the loop made."""
    counted, looped = [], []
    plain_products, output = native.products, RoutedDeltas.output

    def products(x, parts, transposed=False):
        counted.append(len(parts))
        return plain_products(x, parts, transposed)

    def one(self, module, delta, *rest):
        # positions see one row, and parts of a module with a parameter of its own run by delta
        mixed = not (isinstance(module, nn.Embedding) or self.router.route.alike)
        if delta in self.packed and mixed:
            looped.append(delta)
        return output(self, module, delta, *rest)

    monkeypatch.setattr(native, "products", products)
    monkeypatch.setattr(RoutedDeltas, "output", one)
    return counted, looped


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "bert", "gpt2"])
def test_one_call_a_layer(make_family, monkeypatch, calls, name):
    family, (counted, looped) = make_family(name), calls
    model = loaded(family)
    expected = torch.cat([family.alone(n, IDS[i : i + 1]) for i, n in enumerate(MIXED)])
    monkeypatch.setenv(VARIABLE, NATIVE)
    counted.clear()
    found = logits(model, IDS, delta_names=MIXED)
    torch.testing.assert_close(found, expected, **CLOSE)
    # 1: matrices that the other delta stores whole, and parts that run by delta
    assert set(counted) <= {1, 2} and counted.count(2) > counted.count(1) and not looped
    monkeypatch.setenv(VARIABLE, REFERENCE)
    torch.testing.assert_close(logits(model, IDS, delta_names=MIXED), found, **CLOSE)
    assert looped
    assert torch.equal(found[1], logits(model, IDS, delta_names=[None] * 4)[1])  # the base's row


def test_those_it_cannot_read_take_the_loop(make_family, monkeypatch, calls):
    family, (counted, looped) = make_family("llama"), calls
    model = loaded(family)
    names = ["one", "two", "three", None]  # two is on a min-max grid
    monkeypatch.setenv(VARIABLE, NATIVE)
    counted.clear()  # of the compression, where this test makes the family
    found = logits(model, IDS, delta_names=names)
    assert set(counted) == {2} and set(looped) == {"two"}
    expected = torch.cat([family.alone(n, IDS[i : i + 1]) for i, n in enumerate(names)])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert set(NAMES) == {"one", "two", "three"}


def test_many_tokens_a_row_and_rows_in_any_order(make_family, monkeypatch):
    family = make_family("llama")
    model = loaded(family)
    ids, names = token_ids(6, 20), ["three", "one", None, "three", "one", "one"]
    monkeypatch.setenv(VARIABLE, NATIVE)
    found = logits(model, ids, delta_names=names)
    expected = torch.cat([family.alone(n, ids[i : i + 1]) for i, n in enumerate(names)])
    torch.testing.assert_close(found, expected, **CLOSE)
