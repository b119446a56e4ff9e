"""How transformers learns of quant_method "deltamix", without anybody importing deltamix_hf.

torch calls `autoload` at the end of its own import, by our entry point in the group
"torch.backends"; so does `import deltamix_hf`, for where TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps
torch from it. transformers is not imported by then, or only begun. So `autoload` leaves a finder in
`sys.meta_path` that waits for the two modules of transformers that have to know us, and puts
stand-ins into them, which import the real classes when first used. A process that never imports
transformers, or never meets a delta repo, imports none of our code but this file.

`autoload` runs within `import torch` and the finder within every other import: neither may raise,
and nothing heavy may be imported above. If a transformers we do not know has other names, we are
not registered, and a delta repo stops it from loading, by `NOTICE` and by its guards.
"""

import sys
from collections.abc import Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from ..constants import ACCESS, FETCHED, FETCHING, QUANT_METHOD

METHODS = (  # of every PreTrainedModel, see `model_methods.py`
    "load_delta",
    "set_delta",
    "use_deltas",
    "disable_deltas",
    "enable_deltas",
    "delete_delta",
    "list_deltas",
    "set_delta_memory",
    "delta_memory",
)
PROPERTY = "active_deltas"
_QUANTIZERS = "transformers.quantizers.auto"
_MODELS = "transformers.modeling_utils"


def autoload() -> None:
    """Register with transformers, now or as soon as it is imported; more than once is harmless."""
    register()
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


class Finder:
    """Finds nothing of its own: it has `register` called once the modules we wait for have run."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        register()  # what was half imported when torch called us may be complete now
        if fullname not in (_QUANTIZERS, _MODELS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Put the stand-ins where transformers has, by now, a place for them."""
    auto = sys.modules.get(_QUANTIZERS)
    known = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)  # defined last
    if auto is not None and known is not None:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, ConfigStandIn)
        auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, make_quantizer)
    model_class = getattr(sys.modules.get(_MODELS), "PreTrainedModel", None)
    if model_class is not None and METHODS[0] not in vars(model_class):
        for name in (*METHODS, PROPERTY):
            setattr(model_class, name, MethodStandIn(name))
        model_class.from_pretrained = classmethod(_remembering(model_class.from_pretrained))


def _remembering(plain: Any) -> Any:
    """Return `from_pretrained`, which notes how it was told to fetch a model."""

    @wraps(plain.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        names = (*ACCESS, "revision", "subfolder", "variant")
        how = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        trusted = {"trust_remote_code": kwargs.get("trust_remote_code")}
        token = FETCHING.set(how | trusted)
        try:
            found = plain.__func__(cls, *args, **kwargs)
        finally:
            FETCHING.reset(token)
        FETCHED[found[0] if isinstance(found, tuple) else found] = how  # with loading info
        return found

    return from_pretrained


class ConfigStandIn:
    """What transformers asks to read our part of a `config.json`; it makes a DeltaMixConfig."""

    @staticmethod
    def from_dict(config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See `DeltaMixConfig.from_dict`."""
        from transformers.quantizers import auto

        from ..config import DeltaMixConfig

        # transformers lists by hand the config classes whose options a user may override at load
        known: tuple[type, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
        if DeltaMixConfig not in known:
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES = *known, DeltaMixConfig  # type: ignore[assignment]
        return DeltaMixConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)


def make_quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    """What transformers calls for our quantizer, as if it were the class."""
    from .quantizer import DeltaMixHfQuantizer

    return DeltaMixHfQuantizer(quantization_config, **kwargs)


class MethodStandIn:
    """In the place of a method of models until one of them is looked up: then all are put there."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, model: Any, owner: type) -> Any:
        from transformers import PreTrainedModel

        from . import model_methods

        for name in METHODS:
            setattr(PreTrainedModel, name, getattr(model_methods, name))
        setattr(PreTrainedModel, PROPERTY, property(getattr(model_methods, PROPERTY)))
        return getattr(owner if model is None else model, self.name)
