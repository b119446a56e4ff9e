"""What a delta repo's config.json may say of its model, and how much is built of it."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch.nn.modules import module as registration

from ..errors import DeltaMixError
from ..storage.headers import LONGEST_NAME

# A class makes a module or an entry for each of these: 3e6 labels take 2 GB, 2e7 layers 2.5 GB.
_COUNTED = re.compile(r"layer|block|expert|stage|group|network|depth|label|type")
_SIZED = re.compile(r"_(size|dim|length|ids?|eps|width|tokens|theta|rate|std|index|factor)\Z")
_FEWEST_ALLOWED, _MOST_LABELS, _MOST_EXPERTS = 1000, 100_000, 50_000
_MOST_LISTED, _MOST_OF_ANY = 10_000_000, 100_000_000  # in lists, and where no name says a size
_MOST_VALUES, _MOST_TEXT = 250_000, 4_000_000  # two maps of 100,000 labels, in characters
_MOST_CLASSES = 10  # under "architectures"
_LEAST_MADE, _MADE_OF_EACH = 5000, 6  # modules and parameters: 3 s, and of a tensor of a base
_MAPS = ("label2id", "id2label", "dtype", "torch_dtype")  # their keys are no settings
_DTYPES = (None, "float64", "float32", "float16", "bfloat16")
_KERNEL = "_implementation"  # of attention or experts
_FETCHED = re.compile(f"{_KERNEL}|backbone|architecture")  # from the Hub, by transformers or timm


def check_config(config: Mapping[str, Any]) -> None:
    """Check the raw config.json of a delta repo, before anything is built of it.

    Raises a DeltaMixError for more layers than the base has tensors, by the fingerprints of the
    repo: memory follows the bytes of the file. So it does for more values than a model has
    settings, and for the name of another repo, whose files or code transformers would fetch.
    """
    settings = config.get("quantization_config")
    counts = _Counts(_pinned(settings))
    classes = config.get("architectures")
    if isinstance(classes, list) and len(classes) > _MOST_CLASSES:
        raise _refused(f"names {len(classes)} architectures, where a model has one")
    found, text = _values({k: v for k, v in config.items() if v is not settings}), 0
    for values, (name, value, owner) in enumerate(found, 1):
        text += len(name) + (len(value) if isinstance(value, str) else 0)
        if len(name) > LONGEST_NAME:
            raise _refused(f"has a setting with a name of {len(name)} characters, {name[:80]} ...")
        if values > _MOST_VALUES or text > _MOST_TEXT:
            raise _refused(
                f"holds more than {_MOST_VALUES:,} values or {_MOST_TEXT:,} characters beside its "
                "quantization_config"
            )
        _check_text(name, value, owner)
        if isinstance(value, int | float):
            counts.check(name, value, isinstance(owner, list))


def _pinned(settings: Any) -> int:
    """Count the tensors of the base that a quantization_config has fingerprints of."""
    known = settings.get("base_fingerprints") if isinstance(settings, Mapping) else None
    return len(known) if isinstance(known, Mapping) else 0


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield all values, by name, and the object or list that each is in.

    What is in a list has the list's name, and what is in a map from names has the map's.
    """
    waiting: list[tuple[str, Any, Any]] = [(str(k), v, config) for k, v in config.items()]
    while waiting:
        name, value, owner = waiting.pop()
        yield name, value, owner
        if isinstance(value, Mapping):
            inside = name in _MAPS or _KERNEL in name
            waiting += [(name if inside else str(k), v, value) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(name, one, value) for one in value[: _MOST_VALUES + 1]]


def _check_text(name: str, value: Any, owner: Any) -> None:
    """Refuse a dtype that no model is loaded in, and what transformers would look up elsewhere."""
    if name.endswith("dtype") and name in _MAPS:
        if not isinstance(value, Mapping) and value not in _DTYPES:
            raise _refused(f"says {name} = {str(value)[:40]!r}, in which no model is loaded")
    elif isinstance(value, str) and _FETCHED.search(name):
        kind = owner.get("model_type") if isinstance(owner, Mapping) else None
        timm = name != "backbone" or str(kind).startswith("timm")  # else it is an id of the Hub
        if {*"/\\:"} & {*value} or not timm:
            raise _refused(f"says {name} = {value[:80]!r}, which may be another repo")


def _refused(what: str) -> DeltaMixError:
    return DeltaMixError(f"config.json of the delta repo {what}: it is damaged, or no delta's")


class _Counts:
    """The largest counts of layers, experts and labels so far, where the base has `tensors`."""

    def __init__(self, tensors: int):
        self.tensors, self.layers, self.experts = tensors, 1.0, 1.0

    def check(self, name: str, number: float, listed: bool) -> None:
        """Raise a DeltaMixError if a setting is more than such a base can have."""
        most = max(_FEWEST_ALLOWED, self.tensors)
        sized = _SIZED.search(name) is not None
        limit = _MOST_LISTED if listed else math.inf if sized else _MOST_OF_ANY
        if not sized and _COUNTED.search(name):
            limit = _MOST_LABELS if "label" in name else most
        if limit == most and "expert" in name:
            self.experts = max(self.experts, number)
        elif limit == most and "layer" in name:
            self.layers = max(self.layers, number)
        fused = self.layers * self.experts
        if number > limit or fused > max(_MOST_EXPERTS, self.tensors):
            raise DeltaMixError(
                f"config.json of the delta repo says {name} = {str(number)[:40]}, and its base has "
                f"{self.tensors} tensors: it is damaged, or of another model"
            )


@contextmanager
def bounded_building(settings: Any) -> Iterator[None]:
    """Context manager: on the meta device, as many modules and parameters as a model may have.

    Whatever a config calls the count of them. `settings` is the quantization_config. More are a
    ValueError, before time or memory run out.
    """
    made, thread, most = 0, get_ident(), _LEAST_MADE + _MADE_OF_EACH * _pinned(settings)

    def count(*registered: Any) -> None:
        nonlocal made
        made += get_ident() == thread
        if made > most:
            raise ValueError(f"it has more than {most:,} modules and parameters")

    places = [
        registration.register_module_module_registration_hook,
        registration.register_module_parameter_registration_hook,
        registration.register_module_buffer_registration_hook,
    ]
    with ExitStack() as stack, torch.device("meta"):
        for place in places:
            stack.callback(place(count).remove)
        yield
