"""Settings that a delta beside a base cannot have of its own: it runs with the base's.

A fine-tune may have other ones than its base, such as another `rope_theta` for longer texts, names
of labels, a sampling temperature or a chat template. By itself a delta repo runs with its own.
"""

from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..errors import one_line

# Names, how outputs are handed over, the twin of id2label, and each row's own (`end_tokens`).
_OF_NO_EFFECT = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "transformers_weights",
    "quantization_config", "use_cache", "label2id", "return_dict", "return_dict_in_generate",
    "distributed_config", "chunk_size_feed_forward", "is_decoder", "eos_token_id",
)  # fmt: skip
_MOST_TOLD = 5


def warning(repo: str, found: Mapping[str, tuple[Any, Any]]) -> str:
    """Say in one sentence in which settings, by name (the base's, the delta's), a delta differs."""
    told = [
        f"{name} = {shortened(theirs)}, the base runs with {shortened(ours)}"
        for name, (ours, theirs) in [*found.items()][:_MOST_TOLD]
    ]
    if len(found) > _MOST_TOLD:
        told.append(f"{len(found) - _MOST_TOLD} more")
    return one_line(
        f"{repo!r} was made of a model with {'; '.join(told)}: beside it the delta gives something "
        "else than by itself"
    )


def differing_generation(
    ours: GenerationConfig, theirs: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Compare the settings of generation of a model, `ours`, with a generation_config.json."""
    return dict(_differing(ours.to_diff_dict(), theirs, "generation_config"))


def chat_template(read: Callable[[str], Any]) -> Any:
    """Find the chat template of a repo whose files `read` reads by name; None without one."""
    if (text := read("chat_template.jinja")) is not None:
        return text
    return (read("tokenizer_config.json") or {}).get("chat_template")


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
    found = _differing(ours.to_dict(), other)  # token ids count in generation_config.json alone
    return {name: values for name, values in found if not name.endswith("token_id")}


def _differing(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs} - set(_OF_NO_EFFECT), key=str):
            if not str(key).startswith(("_", "output_")):
                yield from _differing(ours.get(key), theirs.get(key), f"{name}.{key}".strip("."))
    elif ours != theirs:
        yield name, (ours, theirs)
