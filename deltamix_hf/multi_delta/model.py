"""What a model with named deltas does at a call: find the rows' deltas and hold them meanwhile.

`manager_of` makes a model an instance of a class made here, whose `forward`, `generate` and
continuous batching take `delta_names`.
"""

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from ..nn.delta_module import made_class
from ..nn.layers import resizes
from .end_tokens import by_row, row_ends
from .item_features import routed_features
from .routing import Names, Route, named_route


def routed_model_class(cls: type[PreTrainedModel], adopted: bool) -> type[PreTrainedModel]:
    """Return `cls` whose `forward` and `generate` take `delta_names`.

    If the model had a delta of its own, which was `adopted`, methods that would now take the base
    for the delta raise DeltaMixError.
    """

    def naming(method: Any, forward: bool) -> Any:
        names = list(inspect.signature(method).parameters)[1:]  # without self

        @wraps(method)  # transformers looks at the signature
        def named(self: Any, *args: Any, delta_names: Names = None, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # modules find their rows when they run
                if delta_names is not None:
                    raise DeltaMixError(
                        "a compiled model takes its deltas from outside: call it within "
                        "`with model.use_deltas(names):`, or after set_delta"
                    )
                return method(self, *args, **kwargs)
            deltas, batch = self.__dict__["dm_deltas"], _batch(self, names, args, kwargs)
            route = named_route(delta_names, len(batch))
            if forward:  # in `generate`, rows may be repeated since they were named
                route = (route or deltas.router.route).of_batch(_rows_inside(self, batch))
            else:
                kwargs |= row_ends(self, deltas.ends, route or deltas.router.route, args, kwargs)
                if delta_names is not None and _fixed_cache(self, kwargs):
                    with deltas.using(delta_names):
                        return method(self, *args, **kwargs)
            ids = None if batch.is_floating_point() else batch
            held = deltas.pool.holding(route.names if route else [])
            with held, deltas.router.using(route, ids):
                return method(self, *args, **kwargs)

        return named

    def set_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        cls._set_gradient_checkpointing(self, *args, **kwargs)
        self.__dict__["dm_deltas"].remember_checkpointed()

    methods: dict[str, Any] = {
        "forward": naming(cls.forward, forward=True),
        "_set_gradient_checkpointing": set_checkpointing,
        **routed_features(cls),
    }
    if hasattr(cls, "generate"):
        methods["generate"] = naming(cls.generate, forward=False)
    for name, wrap in _WRAPPED.items():
        if hasattr(cls, name):
            methods[name] = wrap(getattr(cls, name))
    if adopted:
        methods |= {name: _refused(name) for name in ("save_pretrained", "dequantize")}
    else:
        methods["save_pretrained"] = _without_deltas(cls.save_pretrained)
    return made_class(cls, (cls,), methods, (routed_model_class, cls, adopted))


def _batch(model: Any, names: list[str], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the input whose first dimension has the rows of a call; pictures may be others."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    encoded = given.pop("encoder_outputs", None)
    given["encoded"] = None if encoded is None else encoded[0]
    first = "input_ids", "inputs", "inputs_embeds", model.main_input_name, "encoded", *given
    found = (given.get(name) for name in first)
    return next((t for t in found if isinstance(t, Tensor) and t.dim()), torch.zeros(1))


def _rows_inside(model: Any, batch: Tensor) -> int:
    choices = type(model).__name__.endswith("ForMultipleChoice")  # [rows, choices, length]
    return len(batch) * (batch.shape[1] if choices else 1)


def _unless_changed(method: Any) -> Any:
    """Return `method`, which gives a model embeddings, so that deltas keep those they are for."""

    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        deltas = self.__dict__["dm_deltas"]
        if deltas.pool.entries:
            new, *_ = *args, *kwargs.values(), None
            ends = self.get_input_embeddings(), self.get_output_embeddings()
            module = isinstance(new, nn.Module)
            if new not in ends if module else resizes(self, *args, **kwargs):
                raise DeltaMixError(
                    f"{method.__name__} would change what the loaded deltas are for; delete them, "
                    "and load deltas of fine-tunes that have these embeddings"
                )
        with deltas.router.using(Route([None])):  # BERT hands its head's bias on
            return method(self, *args, **kwargs)

    return checked


def part_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of a part of a model with named deltas that is a model of its own kind."""
    methods = routed_features(cls) | {"save_pretrained": _without_deltas(cls.save_pretrained)}
    return made_class(cls, (cls,), methods, (part_class, cls))


def _without_deltas(plain: Any) -> Any:
    @wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        whole = self.__dict__.get("dm_whole")
        active = (self if whole is None else whole.model).active_deltas
        alone = getattr(self, "_hf_peft_config_loaded", False)  # transformers saves the adapter
        if active and not alone:
            raise DeltaMixError(
                f"save_pretrained writes the base's weights, without {active}: call set_delta("
                "None) first if that is what you want, or load the delta repo by itself"
            )
        plain(self, *args, **kwargs)

    return save_pretrained


def _refused(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise DeltaMixError(
            f"{name} is for a model with one delta, and this one took several in: load the delta "
            "repo you mean once more, without load_delta"
        )

    return method


def _continuous(plain: Any) -> Any:
    @wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # leans on private parts of transformers: only for who uses it
        from . import continuous_batching

        return getattr(continuous_batching, plain.__name__)(plain, self, *args, **kwargs)

    return method


_WRAPPED = {
    "set_input_embeddings": _unless_changed,
    "set_output_embeddings": _unless_changed,
    "resize_token_embeddings": _unless_changed,
    "init_continuous_batching": _continuous,
    "generate_batch": _continuous,
    "_get_stopping_criteria": by_row,
    "_get_logits_processor": by_row,
}


def _fixed_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `generate` may record CUDA graphs: it compiles for a cache of fixed size."""
    config = kwargs.get("generation_config") or model.generation_config
    asked = kwargs.get("cache_implementation") or config.cache_implementation
    return asked is not None or kwargs.get("past_key_values") is not None
