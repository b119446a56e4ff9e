"""Which part of a packed matrix belongs where in a layer of vLLM.

A layer of vLLM may hold several matrices one below the other (q, k and v; gate and up), and under
tensor parallelism a rank holds some rows of each (column-parallel layers and vocabularies) or some
columns (row-parallel ones). vLLM names the matrices of a layer "q", "k", "v", or by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from ..errors import DeltaMixError
from ..nn.tensor_parallel import part_of
from ..quantization.packed_delta import PackedDelta

Shard = str | int | tuple[int, ...] | None  # which matrices of a layer; None: all, stored as one
_QKV = {"q": 0, "k": 1, "v": 2}
# Subclasses may share rows out in other ways.
_KNOWN = (
    *(ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear),
    *(RowParallelLinear, VocabParallelEmbedding, ParallelLMHead),
)


class Piece(NamedTuple):
    """A packed delta to some of a layer's outputs on this rank: [len(outputs), inputs here]."""

    outputs: slice
    packed: PackedDelta


def pieces(
    layer: nn.Module, shard: Shard, tensors: Mapping[str, Tensor], group_size: int
) -> list[Piece]:
    """Cut this rank's part out of the packed tensors of one stored matrix.

    Raises DeltaMixError if they do not fit the layer, or the layer cannot be shared out.
    """
    if layer.tp_size != 1 and type(layer) not in _KNOWN:
        raise DeltaMixError(
            f"how tensor parallelism shares out a {type(layer).__name__} is not known here: use "
            "--tensor-parallel-size 1, or serve the merged model ('deltamix merge')"
        )
    rows, held = _rows(layer)
    wanted = _wanted(shard, len(rows))
    n = int(layer.input_size)  # type: ignore[arg-type]
    packed = PackedDelta.checked(sum(rows[i] for i in wanted), n, group_size, tensors)
    columns, found, above = range(n), [], 0
    if isinstance(layer, RowParallelLinear):
        columns = _share(layer.tp_rank, layer.input_size_per_partition)
    for i in wanted:
        first, here = sum(map(len, held[:i])), held[i]
        if here:  # a rank may hold nothing but the padding of a vocabulary
            chosen = torch.arange(above + here.start, above + here.stop)
            part = part_of(packed, chosen, torch.arange(columns.start, columns.stop))
            found.append(Piece(slice(first, first + len(here)), part))
        above += rows[i]
    return found


def _wanted(shard: Shard, count: int) -> list[int]:
    if shard is None:
        return list(range(count))
    if isinstance(shard, tuple):
        return list(shard)
    return [_QKV[shard] if isinstance(shard, str) else shard]


def _rows(layer: Any) -> tuple[list[int], list[range]]:
    """How many rows each of a layer's matrices has, and which of them this rank holds."""
    if isinstance(layer, VocabParallelEmbedding):
        held = layer.shard_indices
        here = range(held.org_vocab_start_index, held.org_vocab_end_index)
        return [layer.org_vocab_size], [here]
    local = layer.output_partition_sizes
    if isinstance(layer, QKVParallelLinear):  # heads of k and v may be on several ranks each
        kv = layer.total_num_kv_heads
        rows = [layer.total_num_heads * layer.head_size, kv * layer.head_size]
        rows.append(kv * layer.v_head_size)
        ranks = [layer.tp_rank] + 2 * [layer.tp_rank // layer.num_kv_head_replicas]
    elif isinstance(layer, ColumnParallelLinear):
        rows, ranks = [size * layer.tp_size for size in local], [layer.tp_rank] * len(local)
    else:
        rows, ranks = local, [0] * len(local)
    return rows, [_share(rank, size) for rank, size in zip(ranks, local, strict=True)]


def _share(rank: int, size: int) -> range:
    return range(rank * size, rank * size + size)
