"""Parts of transformers that are not its public interface, for every layer below `integration`.

What a new version of transformers may break is listed here, in `integration` and in `vllm`, and
nowhere else (tests/test_private_parts.py). A name is looked up when it is first asked for: a
version that lacks one breaks only what needs it, and continuous batching costs no one else time.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "conversion_mapping": ("get_model_conversion_mapping",),
    "core_model_loading": (
        "ConversionOps",  # what becomes of checkpoint tensors on their way into a parameter
        "WeightConverter",
        "WeightRenaming",
        "dot_natural_key",
        "rename_source_key",
    ),
    "distributed": ("tensor_parallel",),  # the module: styles of sharing out a layer's weights
    "dynamic_module_utils": ("get_class_from_dynamic_module",),
    "generation.continuous_batching.cache": ("PagedAttentionCache",),
    "generation.continuous_batching.continuous_api": (
        "ContinuousBatchProcessor",
        "ContinuousBatchingManager",
    ),
    "models.auto.auto_factory": ("add_generation_mixin_to_remote_model",),
    "integrations": ("moe",),  # the module: grouped products of experts
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = import_module(f"transformers.{module}")
            return getattr(found, name, None) or import_module(f"{found.__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
