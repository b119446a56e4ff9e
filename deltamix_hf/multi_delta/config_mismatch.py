"""Settings that change what a model computes: a delta beside a base runs with the base's.

A fine-tune may have other ones than its base, such as another `rope_theta` for longer texts. By
itself a delta repo runs with its own config.json, beside a base it cannot.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

# Names, what other code does with the outputs, and what is told to generate().
_OF_NO_EFFECT = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "transformers_weights",
    "quantization_config", "use_cache", "id2label", "label2id", "problem_type", "return_dict",
    "distributed_config", "chunk_size_feed_forward", "is_decoder",
)  # fmt: skip


def differing(ours: PreTrainedConfig, theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the settings of a model, `ours`, with a delta repo's config.json.

    Empty where config.json is of another kind of model or unreadable, which other checks refuse.
    """
    if theirs.get("model_type") != ours.model_type:
        return {}
    try:
        other = type(ours).from_dict(dict(theirs)).to_dict()
    except Exception:  # anything a class may say to what a stranger wrote
        return {}
    return dict(_differing(ours.to_dict(), other))


def _differing(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs} - set(_OF_NO_EFFECT), key=str):
            if not (str(key).startswith(("_", "output_")) or str(key).endswith("token_id")):
                yield from _differing(ours.get(key), theirs.get(key), f"{name}.{key}".strip("."))
    elif ours != theirs:
        yield name, (ours, theirs)
