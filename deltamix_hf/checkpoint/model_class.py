"""What config.json says a repo is: a delta or a whole model, and of which class."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..constants import QUANT_METHOD
from ..errors import DeltaMixError, first_line


def read_config(repo: str) -> PreTrainedConfig:
    """Read the config of a repo, a folder or Hub id; a DeltaMixError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(repo)
    except (OSError, ValueError) as error:
        raise DeltaMixError(f"cannot find the model {repo!r}: {first_line(error)}") from error
    except Exception as error:  # a config class refuses odd values with whatever type it likes
        raise DeltaMixError(f"config.json of {repo!r} is damaged: {first_line(error)}") from error


def is_delta(config: PreTrainedConfig) -> bool:
    """Tell whether a config is a delta repo's."""
    settings = getattr(config, "quantization_config", None) or {}
    return dict(settings).get("quant_method") == QUANT_METHOD


def delta_config(repo: str) -> PreTrainedConfig:
    """Read the config of a delta repo, as `read_config`; a DeltaMixError if it is a whole model."""
    if not is_delta(config := read_config(repo)):
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    return config


def model_class(repo: str, config: PreTrainedConfig) -> Any:
    """Look up the first class of `repo` that this transformers knows; DeltaMixError if none is."""
    names = config.architectures or []
    cls: Any = next((c for n in names if (c := getattr(transformers, str(n), None))), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise DeltaMixError(
            f"config.json of {repo!r} names {names or 'no architecture'}, which this transformers "
            f"{transformers.__version__} has not: upgrade it, or check the repo"
        )
    return cls


def empty_model(repo: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Build the model of a repo on the meta device: names and shapes alone.

    Raises a DeltaMixError if transformers has no such class, or it refuses the config.
    """
    config = config or read_config(repo)
    cls = model_class(repo, config)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # of whatever type the model's own code raises for odd sizes
        raise DeltaMixError(
            f"config.json of {repo!r} makes no {cls.__name__}: {first_line(error)}"
        ) from error
