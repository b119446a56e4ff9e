"""What config.json says a repo is: a delta or a whole model, and of which class."""

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..constants import QUANT_METHOD
from ..errors import DeltaMixError, first_line
from ..storage.untrusted_paths import CONFIG, read_object
from ..transformers_private import (
    add_generation_mixin_to_remote_model,
    get_class_from_dynamic_module,
)
from .untrusted_config import bounded_building, check_config


def read_config(repo: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a repo, a folder or Hub id; a DeltaMixError if it cannot be read.

    `trust_remote_code`, here and below: run the repo's own code, as transformers' option of that
    name; only who calls may say so, no file.
    """
    try:
        path = os.path.join(repo, CONFIG)
        raw = (
            read_object(path) if os.path.isfile(path) else PreTrainedConfig.get_config_dict(repo)[0]
        )
        if "quantization_config" in raw:
            check_config(raw)
        return AutoConfig.from_pretrained(repo, trust_remote_code=trust_remote_code)
    except DeltaMixError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise DeltaMixError(
                f"{repo!r} is a model of its own code, which is run only if you say so: read it, "
                "then give trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise DeltaMixError(f"cannot find the model {repo!r}: {first_line(error)}") from error
    except Exception as error:  # a config class refuses odd values with whatever type it likes
        raise DeltaMixError(f"config.json of {repo!r} is damaged: {first_line(error)}") from error


def is_delta(config: PreTrainedConfig) -> bool:
    """Tell whether a config is a delta repo's."""
    settings = getattr(config, "quantization_config", None) or {}
    return dict(settings).get("quant_method") == QUANT_METHOD


def delta_config(repo: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a delta repo, as `read_config`; a DeltaMixError if it is a whole model."""
    if not is_delta(config := read_config(repo, trust_remote_code)):
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    return config


def model_class(repo: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Look up the first class of `repo` that this transformers knows; DeltaMixError if none is.

    With `trust_remote_code` the repo's own classes come first, as transformers has it.
    """
    names = config.architectures if isinstance(config.architectures, list) else []
    found = (_own_class(repo, config, str(name)) for name in names if trust_remote_code)
    cls: Any = next(filter(None, found), None)
    cls = cls or next((c for n in names if (c := getattr(transformers, str(n), None))), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise DeltaMixError(
            f"config.json of {repo!r} names {names or 'no architecture'}, which this transformers "
            f"{transformers.__version__} has not: upgrade it, or check the repo"
        )
    return cls


def _own_class(repo: str, config: PreTrainedConfig, name: str) -> Any:
    """Import the class `name` from the repo's code, if its config says where; else None."""
    for auto, place in (getattr(config, "auto_map", None) or {}).items():
        if isinstance(place, str) and place.rpartition(".")[2] == name:
            cls: Any = get_class_from_dynamic_module(place, repo)
            cls.register_for_auto_class(auto)  # saved along with its code
            return add_generation_mixin_to_remote_model(cls)
    return None


def empty_model(
    repo: str, config: PreTrainedConfig | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model of a repo on the meta device: names and shapes alone.

    Raises a DeltaMixError if transformers has no such class, or it refuses the config.
    """
    config = config or read_config(repo, trust_remote_code)
    cls = model_class(repo, config, trust_remote_code)
    config._attn_implementation = "eager"  # another might be fetched, and names are the same
    try:
        settings = getattr(config, "quantization_config", None)
        with bounded_building(settings) if settings else torch.device("meta"):
            return cls(config)
    except Exception as error:  # of whatever type the model's own code raises for odd sizes
        raise DeltaMixError(
            f"config.json of {repo!r} makes no {cls.__name__}: {first_line(error)}"
        ) from error
