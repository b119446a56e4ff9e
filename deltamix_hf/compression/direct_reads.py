"""Layers whose weight a model reads past the layer's own forward: a delta there would be missed.

WavLM's attention hands `q_proj.weight` to a function, DeBERTa looks its relative positions up in
`rel_embeddings.weight`. One short forward pass shows it: every torch function that gets the weight
of a layer that is not running at that time is a direct read.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration.statistics import hooked, inputs_of
from ..nn.layers import weight_of

logger = logging.get_logger(__name__)

_SAMPLES = 8000  # of sound: half a second


class _Watch(TorchFunctionMode):
    """Notes which watched weights are read while no module that owns them runs."""

    def __init__(self, owners: Mapping[int, str]):
        super().__init__()
        self.owners = owners  # id of a weight -> name of the module
        self.running: list[int] = []  # ids of the weights of the modules that run
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not .dtype or .shape
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.owners and id(leaf) not in self.running:
                    self.found.add(self.owners[id(leaf)])
        return result


@torch.no_grad()
def read_directly(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Find which of the modules `names` have their weight read by others in a forward pass.

    Empty, with a note in the log, for a model whose inputs we cannot make up.
    """
    modules = {name: model.get_submodule(name) for name in names}
    watch = _Watch({id(weight_of(module)): name for name, module in modules.items()})

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        watch.running.append(id(module.weight))

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        watch.running.remove(id(module.weight))

    named = model.named_modules()  # a tied weight is read by its twins, too
    users = {n: m for n, m in named if id(getattr(m, "weight", None)) in watch.owners}
    try:
        inputs = _probe(model)
        with hooked(users, enter, leave), watch:
            model(**inputs)
    except Exception as error:  # anything a model may say to inputs it does not like
        logger.info("cannot try out which weights are read directly: %s", error)
        return []
    return [name for name in modules if name in watch.found]


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """Small inputs of the kind the model takes."""
    config: Any = model.config
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    kind, shape = model.main_input_name, [1, _SAMPLES]
    if kind == "pixel_values":
        size = config.image_size
        shape = [1, config.num_channels, *([size] * 2 if isinstance(size, int) else size[:2])]
    elif kind == "input_features":
        shape = [1, config.num_mel_bins, 2 * config.max_source_positions]
    elif kind != "input_values":
        return inputs_of(model, ids)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = {kind: noise.to(model.device, model.dtype)}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
