"""What a model with named deltas does at a call: find the rows' deltas and hold them meanwhile.

`manager_of` makes a model an instance of a class made here, whose `forward`, `generate` and
continuous batching take `delta_names`.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DeltaMixError
from .end_tokens import by_row, row_ends
from .routing import Names, named_route


def routed_model_class(cls: type[PreTrainedModel], adopted: bool) -> type[PreTrainedModel]:
    """Return `cls` whose `forward` and `generate` take `delta_names`.

    If the model had a delta of its own, which was `adopted`, methods that would now take the base
    for the delta raise DeltaMixError.
    """

    def naming(method: Any, forward: bool) -> Any:
        @wraps(method)  # transformers looks at the signature
        def named(self: Any, *args: Any, delta_names: Names = None, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # modules find their rows when they run
                if delta_names is not None:
                    raise DeltaMixError(
                        "a compiled model takes its deltas from outside: call it within "
                        "`with model.use_deltas(names):`, or after set_delta"
                    )
                return method(self, *args, **kwargs)
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim())
            deltas, rows = self.__dict__["dm_deltas"], next((len(t) for t in tensors), 1)
            route = named_route(delta_names, rows)
            if forward:  # in `generate`, rows may be repeated since they were named
                route = (route or deltas.router.route).of_batch(rows)
            else:
                kwargs |= row_ends(self, deltas.ends, route or deltas.router.route, args, kwargs)
                if delta_names is not None and _fixed_cache(self, kwargs):
                    with deltas.using(delta_names):
                        return method(self, *args, **kwargs)
            with deltas.pool.holding(route.names if route else []), deltas.router.using(route):
                return method(self, *args, **kwargs)

        return named

    def set_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        cls._set_gradient_checkpointing(self, *args, **kwargs)
        self.__dict__["dm_deltas"].remember_checkpointed()

    methods: dict[str, Any] = {
        "forward": naming(cls.forward, forward=True),
        "_set_gradient_checkpointing": set_checkpointing,
    }
    if hasattr(cls, "generate"):
        methods["generate"] = naming(cls.generate, forward=False)
    for name, wrap in _WRAPPED.items():
        if hasattr(cls, name):
            methods[name] = wrap(getattr(cls, name))
    if adopted:
        methods |= {name: _refused(name) for name in ("save_pretrained", "dequantize")}
    else:
        methods["save_pretrained"] = _without_deltas(cls.save_pretrained, None)
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _unless_changed(method: Any) -> Any:
    """Return `method`, which gives a model embeddings, so that deltas keep those they are for."""

    @wraps(method)
    def checked(self: Any, new: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__["dm_deltas"].pool.entries:
            new = kwargs.get("new_num_tokens", new)
            step = kwargs.get("pad_to_multiple_of", args[0] if args else None) or 1
            rows = self.get_input_embeddings().weight.shape[0]
            same = new in (self.get_input_embeddings(), self.get_output_embeddings())
            if not (
                same if isinstance(new, nn.Module) else -(-(new or rows) // step) * step == rows
            ):
                raise DeltaMixError(
                    f"{method.__name__} would change what the loaded deltas are for; delete them, "
                    "and load deltas of fine-tunes that have these embeddings"
                )
        return method(self, new, *args, **kwargs)

    return checked


def part_class(cls: type[PreTrainedModel], whole: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of a part of a model with named deltas that is a model of its own kind."""
    save = _without_deltas(cls.save_pretrained, whole)
    return type(cls.__name__, (cls,), {"save_pretrained": save, "__module__": cls.__module__})


def _without_deltas(plain: Any, whole: PreTrainedModel | None) -> Any:
    @wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        active = (self if whole is None else whole).active_deltas
        if active:
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
