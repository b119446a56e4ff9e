"""Makes quant_method "deltamix" known to transformers, and the tenant methods to its models."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.quantizers import auto

from . import tenant_methods
from .config import QUANT_METHOD

METHODS = (
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


def register(config_class: type, quantizer_class: type) -> None:
    """Register both classes once; importing twice (or reloading) is harmless."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(config_class)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(quantizer_class)
    for name in METHODS:
        setattr(PreTrainedModel, name, getattr(tenant_methods, name))
    setattr(PreTrainedModel, "active_deltas", property(tenant_methods.active_deltas))  # noqa: B010
    # transformers lists by hand the config classes whose options a user may override at load
    if config_class not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = *known, config_class  # type: ignore[assignment]
