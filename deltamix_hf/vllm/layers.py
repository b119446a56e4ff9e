"""What a layer adds to the base's output: vLLM's own method does the base, our op the deltas.

The base weight stays vLLM's, so its fast paths apply (on a CPU it is even packed away and no longer
there). The sum is one opaque op for vLLM's compiler, which looks its layer up when it runs: vLLM
keeps compiled graphs by model and options, not by what a delta repo holds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ..errors import DeltaMixError
from ..ops.low_rank import low_rank, low_rank_rows
from ..ops.packed_op import cheapest
from ..quantization.packed_layout import DTYPES, part_names
from ..quantization.uniform import MIN_MAX
from .batch import Batch, Groups
from .partition import Piece, Shard, pieces


class LayerDeltas:
    """Hold the deltas of one layer on this rank, and add their products to its output."""

    def __init__(self, name: str):
        self.name = name  # under which compiled code finds it
        # Packed tensors that vLLM's weight loading has brought, by matrix of the layer.
        self.incoming: dict[Shard, dict[str, Tensor]] = {}
        self.own: list[Piece] = []  # of the delta repo that is served: for all rows
        self.requested: dict[int, list[Piece]] = {}  # of deltas that requests name, by number
        self.biases: dict[int, Tensor] = {}  # what these add to the layer's bias, float32
        self.batch = Batch()  # which rows take which of them

    def receive(self, part: str, parameter: Any, tensor: Tensor, shard: Shard = None) -> None:
        """Keep a packed tensor that vLLM loads; this is the weight loader of its parameter."""
        self.incoming.setdefault(shard, {})[part] = tensor

    def take(self, layer: nn.Module, group_size: int, device: torch.device) -> list[Piece]:
        """Make this rank's pieces of what came in."""
        incoming, self.incoming = self.incoming, {}
        made = [pieces(layer, shard, parts, group_size) for shard, parts in incoming.items()]
        return [Piece(outputs, packed.to(device)) for found in made for outputs, packed in found]

    def add(self, y: Tensor, x: Tensor, head: bool = False) -> None:
        """Add the deltas' products with x [..., n] to y [..., m]; `head`: x is not all tokens'."""
        for outputs, packed in self.own:
            y[..., outputs] += cheapest(low_rank, x, packed, False)
        for number, rows in self._groups(x, head):
            some = x[rows]
            for outputs, packed in self.requested.get(number, ()):
                added = cheapest(low_rank, some, packed, False).to(y.dtype)
                y[:, outputs].index_add_(0, rows, added)
            if number in self.biases:
                change = self.biases[number].to(y.dtype).expand(len(rows), -1)
                y[:, : change.shape[1]].index_add_(0, rows, change)

    def add_rows(self, y: Tensor, ids: Tensor) -> None:
        """Add rows `ids` [...] of the deltas to an embedding to y [..., n]."""
        for _, packed in self.own:
            y += cheapest(low_rank_rows, ids, packed, y.dtype)
        for number, rows in self._groups(ids, head=False):
            for _, packed in self.requested.get(number, ()):
                y.index_add_(0, rows, cheapest(low_rank_rows, ids[rows], packed, y.dtype))

    def _groups(self, x: Tensor, head: bool) -> Groups:
        known = self.requested.keys() | self.biases.keys()
        return self.batch.groups(x, known, head) if known else []


@torch.library.custom_op("deltamix::vllm_add", mutates_args=("y",))
def vllm_add(y: Tensor, x: Tensor, name: str, rows: bool) -> None:
    """Call `LayerDeltas.add`, or for `rows` `add_rows`, of the running model's layer `name`."""
    deltas: LayerDeltas = get_forward_context().no_compile_layers[name]
    (deltas.add_rows if rows else deltas.add)(y, x)


vllm_add.register_fake(lambda y, x, name, rows: None)


def deltas_of(model: nn.Module) -> dict[int, tuple[Any, LayerDeltas]]:
    """Find the layers that have a place for deltas, each place once (tied layers share one)."""
    found: dict[int, tuple[Any, LayerDeltas]] = {}
    for layer in model.modules():
        if isinstance(deltas := getattr(layer, "deltas", None), LayerDeltas):
            found.setdefault(id(deltas), (layer, deltas))
    return found


class _Method(QuantizeMethodBase):
    """What linear layers and embeddings share, made of a `DeltaMixQuantization`."""

    plain_type: type[Any]  # vLLM's own method

    def __init__(self, config: Any):
        self.settings, self.plain = config.settings, self.plain_type()

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Give a layer its place for deltas too, and the names under which they are stored."""
        self.plain.create_weights(layer, *args, **kwargs)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        deltas = LayerDeltas(f"deltamix.{len(layers)}")
        layers[deltas.name] = deltas
        layer.deltas = deltas  # type: ignore[assignment]
        for part, name in part_names("", MIN_MAX).items():
            empty = nn.Parameter(torch.empty(0, dtype=DTYPES[part]), requires_grad=False)
            empty.weight_loader = partial(deltas.receive, part)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        deltas: LayerDeltas = layer.deltas
        if deltas.incoming and self.settings is None:
            raise DeltaMixError("this is a delta repo, and its config.json does not say so")
        if deltas.incoming:
            deltas.own = deltas.take(layer, self.settings.method.group_size, layer.weight.device)
        self.plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.plain.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            vllm_add(y, x, layer.deltas.name, rows=False)
        else:
            layer.deltas.add(y, x, head=isinstance(layer, VocabParallelEmbedding))
        return y


@register_weight_loader_v2_supported_method
class DeltaMixLinearMethod(_Method, LinearMethodBase):
    """A linear layer, whatever its partition, and the packed deltas to its matrices."""

    plain_type = UnquantizedLinearMethod


class DeltaMixEmbeddingMethod(_Method):
    """An embedding or output head by token, and the packed delta to it."""

    plain_type = UnquantizedEmbeddingMethod

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        y: Tensor = self.plain.embedding(layer, ids)
        if torch.compiler.is_compiling():
            vllm_add(y, ids, layer.deltas.name, rows=True)
        else:
            layer.deltas.add_rows(y, ids)
        return y

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head takes the embedding's weight and its deltas."""
        layer = self.plain.tie_weights(layer, embed_tokens)
        layer.deltas = embed_tokens.deltas
        for name in part_names("", MIN_MAX).values():
            setattr(layer, name, getattr(embed_tokens, name))
        return layer
