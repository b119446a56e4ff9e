"""deltamix_hf: store a fine-tune as a small delta to its base model and run it beside the base.

Importing the package registers quant_method "deltamix" with transformers, and imports neither
transformers nor torch: the names below are looked up when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .constants import QUANT_METHOD
from .errors import DeltaMixError
from .integration.registration import autoload

if TYPE_CHECKING:
    from .config import DeltaMixConfig as DeltaMixConfig
    from .integration.quantizer import DeltaMixHfQuantizer as DeltaMixHfQuantizer
    from .method import METHODS as METHODS
    from .method import Method as Method
    from .nn.layers import DeltaEmbedding as DeltaEmbedding
    from .nn.layers import DeltaLinear as DeltaLinear
    from .nn.merging import cache_merged as cache_merged

_MODULES = {
    "DeltaEmbedding": "nn.layers",
    "DeltaLinear": "nn.layers",
    "DeltaMixConfig": "config",
    "DeltaMixHfQuantizer": "integration.quantizer",
    "METHODS": "method",
    "Method": "method",
    "cache_merged": "nn.merging",
}

__version__ = "0.1.0"
__all__ = ["QUANT_METHOD", "DeltaMixError", "__version__", *_MODULES]

autoload()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
