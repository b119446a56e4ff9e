"""Run a model on small made-up inputs: what its modules get, and who reads their weights."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

_SAMPLES = 8000  # of sound: half a second
_TOKENS = 11  # of text; `row_layout.py` needs a number that experts cannot share out evenly


@contextmanager
def hooked(named: Mapping[str, nn.Module], before: Any = None, after: Any = None) -> Iterator[None]:
    """Context manager: call before(name, module, args, kwargs) and after(name, module, args, y)."""
    with ExitStack() as stack:
        for name, module in named.items():
            if before:
                hook = partial(before, name)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            if after:
                stack.enter_context(module.register_forward_hook(partial(after, name)))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: no module is in training mode; each is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: PreTrainedModel) -> torch.device:
    """Find where the model runs; `LazyWeights` says so, whose parameters are nowhere."""
    device: torch.device = getattr(model, "dm_device", model.device)
    return device


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Make the keyword arguments of a forward pass over token ids int64 [rows, length]."""
    ids = ids.to(device_of(model))
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False  # blocks are run again on their own: nothing may be remembered
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Make two different rows of what the model takes: text, pictures or sound.

    Raises whatever a config that lacks the sizes of its inputs raises.
    """
    whole: Any = model.config
    part = getattr(model, "encoder", None)
    config, kind = whole, model.main_input_name
    if isinstance(part, PreTrainedModel) and hasattr(whole, "encoder"):  # of two configs
        config, kind = whole.encoder, part.main_input_name
    ids = _ids(whole.get_text_config(decoder=True)).to(model.device)
    if kind == "pixel_values":
        size = config.image_size
        shape = [config.num_channels, *([size] * 2 if isinstance(size, int) else size[:2])]
    elif kind == "input_features":
        shape = [config.num_mel_bins, 2 * config.max_source_positions]
    elif kind == "input_values":
        shape = [_SAMPLES]
    else:
        return inputs_of(model, ids)
    noise = torch.randn([2, *shape], generator=torch.Generator().manual_seed(0))
    inputs = {kind: noise.to(model.device, model.dtype)}
    return inputs | ({"decoder_input_ids": ids} if whole.is_encoder_decoder else {})


def _ids(config: Any) -> Tensor:
    """Make two rows [2, _TOKENS] of ordinary tokens, their last one the end if there is one."""
    named = config.to_dict().items()
    special = [value for key, value in named if key.endswith(("_token_id", "_index"))]
    tokens = range(getattr(config, "vocab_size", 1))
    ordinary = [token for token in tokens if token not in special] or [0]
    ids = torch.tensor(list(islice(cycle(ordinary), 2 * _TOKENS))).view(2, _TOKENS)
    end: Any = getattr(config, "eos_token_id", None)
    if end in tokens:
        ids[:, -1] = end  # BART's classifiers look for it
    return ids


class DirectReads(TorchFunctionMode):
    """Note in `found` which parameters of some modules, by full name, are read by others.

    WavLM's attention hands `q_proj.weight` to a function, DeBERTa looks its relative positions up
    in `rel_embeddings.weight`: every torch function that gets a parameter of a layer that is not
    running at that time is a direct read. `ran` names the modules that have run.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.owners: dict[int, tuple[str, str]] = {}  # id of a parameter -> module, its name there
        for name, module in modules.items():
            own = module._parameters.items()
            self.owners |= {id(tensor): (name, leaf) for leaf, tensor in own if tensor is not None}
        self.running: list[int] = []  # ids of the parameters of the modules that run
        self.found, self.ran = set[str](), set[str]()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Context manager: watch what runs in the model."""
        self.running.clear()  # of a pass that failed
        named = model.named_modules()  # a tied weight is read by its twins, too
        watched = {n: (m, {*map(id, m._parameters.values())} & {*self.owners}) for n, m in named}

        def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running += watched[name][1]
            self.ran |= {self.owners[own][0] for own in watched[name][1]}

        def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
            for own in watched[name][1]:
                self.running.remove(own)

        with hooked({n: m for n, (m, own) in watched.items() if own}, enter, leave), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not .dtype or .shape
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.owners and id(leaf) not in self.running:
                    self.found.add(".".join(self.owners[id(leaf)]))
        return result
