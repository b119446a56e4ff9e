"""Parts of the plug-in without a server: what ranks hold, and versions of vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from torch import nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from deltamix_hf import DeltaMixError
from deltamix_hf.quantization.gaussian import GAUSSIAN
from deltamix_hf.quantization.gptq import round_rows
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.vllm import register
from deltamix_hf.vllm.partition import pieces

HEAD, INPUTS = 8, 40


def layer_of(cls: type[nn.Module], **values: Any) -> Any:
    """A layer that knows its partition, without weights or processes."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


def packed(m: int, n: int = INPUTS) -> PackedDelta:
    """Three ranks of an [m, n] matrix, of normal values."""
    random = torch.Generator().manual_seed(m)
    widths = [torch.tensor(bits) for bits in ((8, 3, 2), (4, 3, 2))]
    sides = [
        round_rows(torch.randn(3, length, generator=random), bits, 0, GAUSSIAN)
        for length, bits in zip((n, m), widths, strict=True)
    ]
    return PackedDelta.pack(*sides)


def qkv(rank: int, ranks: int) -> Any:
    """4 heads of queries, 2 of keys and of values; with 4 ranks, two share one of these."""
    replicas = max(1, ranks // 2)
    local = [4 * HEAD // ranks] + 2 * [2 * HEAD * replicas // ranks]
    heads = {"total_num_heads": 4, "total_num_kv_heads": 2, "head_size": HEAD, "v_head_size": HEAD}
    sizes = {"output_partition_sizes": local, "num_kv_head_replicas": replicas}
    place = {"tp_rank": rank, "tp_size": ranks, "input_size": INPUTS}
    return layer_of(QKVParallelLinear, **heads, **sizes, **place)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_queries_keys_and_values(ranks):
    stored = {"q": packed(4 * HEAD), "k": packed(2 * HEAD), "v": packed(2 * HEAD)}
    for rank in range(ranks):
        layer = qkv(rank, ranks)
        found = torch.zeros(sum(layer.output_partition_sizes), INPUTS)
        for name, whole in stored.items():
            for piece in pieces(layer, name, whole.tensors, 0):
                found[piece.outputs] += piece.packed.dense()
        kv = rank // layer.num_kv_head_replicas
        sizes = zip("qkv", (rank, kv, kv), layer.output_partition_sizes, strict=True)
        expected = [stored[n].dense()[i * size : i * size + size] for n, i, size in sizes]
        torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_matrices_that_are_stored_as_one(shard):
    whole = packed(48)
    for rank in range(2):
        place = {"tp_rank": rank, "tp_size": 2, "input_size": INPUTS}
        layer = layer_of(MergedColumnParallelLinear, output_partition_sizes=[16, 8], **place)
        gate, up = pieces(layer, shard, whole.tensors, 0)
        assert (gate.outputs, up.outputs) == (slice(0, 16), slice(16, 24))
        dense = whole.dense()
        torch.testing.assert_close(gate.packed.dense(), dense[:32][rank * 16 :][:16])
        torch.testing.assert_close(up.packed.dense(), dense[32:][rank * 8 :][:8])


def test_inputs_over_ranks():
    whole = packed(24)
    parts = []
    for rank in range(2):
        place = {"tp_rank": rank, "tp_size": 2, "input_size": INPUTS}
        sizes = {"output_partition_sizes": [24], "input_size_per_partition": INPUTS // 2}
        (piece,) = pieces(layer_of(RowParallelLinear, **place, **sizes), None, whole.tensors, 0)
        parts.append(piece.packed.dense())
    torch.testing.assert_close(torch.cat(parts, 1), whole.dense())


def test_a_vocabulary_and_its_padding():
    whole = packed(50)
    for rank, (first, last) in enumerate([(0, 32), (32, 50), (50, 50)]):
        held = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)
        place = {"tp_rank": rank, "tp_size": 3, "input_size": INPUTS}
        layer = layer_of(VocabParallelEmbedding, shard_indices=held, org_vocab_size=50, **place)
        found = pieces(layer, None, whole.tensors, 0)
        assert len(found) == (first < last)
        for piece in found:
            assert piece.outputs == slice(0, last - first)
            torch.testing.assert_close(piece.packed.dense(), whole.dense()[first:last])


def test_a_layer_that_shares_out_in_ways_unknown_is_refused():
    class Odd(RowParallelLinear):
        pass

    with pytest.raises(DeltaMixError, match="shares out a Odd is not known"):
        pieces(layer_of(Odd, tp_size=2), None, packed(24).tensors, 0)


def test_another_version_of_vllm_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    register()
    config = get_quantization_config("deltamix")
    for asked in (config, lambda: config.from_config({})):
        with pytest.raises(DeltaMixError, match=r"in vLLM 0\.32\.0, this is 0\.99\.0"):
            asked()
    monkeypatch.undo()
    register()
    register()  # more than once is harmless
    assert get_quantization_config("deltamix").__name__ == "DeltaMixQuantization"
