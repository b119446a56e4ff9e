"""deltamix_hf: store a fine-tune as a small delta to its base model and run it beside the base.

Importing the package registers quant_method "deltamix" with transformers.
"""

from .config import QUANT_METHOD, DeltaMixConfig
from .errors import DeltaMixError
from .merged import cache_merged
from .modules import DeltaEmbedding, DeltaLinear
from .quantizer import DeltaMixHfQuantizer
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "QUANT_METHOD",
    "DeltaEmbedding",
    "DeltaLinear",
    "DeltaMixConfig",
    "DeltaMixError",
    "DeltaMixHfQuantizer",
    "__version__",
    "cache_merged",
]

register(DeltaMixConfig, DeltaMixHfQuantizer)
