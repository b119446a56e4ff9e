"""Loading models for the commands: with the class a repo was saved with, on a GPU if any."""

import os
import warnings
from typing import Any

from ..checkpoint.delta_repo import find_delta
from ..checkpoint.model_class import is_delta, model_class, read_config
from ..errors import DeltaMixError, first_line


def load_model(
    repo: str, base: str | None = None, dequantize: bool = False, trust_remote_code: bool = False
) -> Any:
    """Load a whole model or a delta repo, by path or Hub id, ready to run.

    `base` is for a delta repo whose base is not where the repo says; `dequantize` makes it dense;
    `trust_remote_code` lets it bring code of its own.
    Raises DeltaMixError if it is not found, of a class transformers has not, or a base is given for
    what is no delta repo.
    """
    from .. import DeltaMixConfig

    if not is_delta(read_config(repo, trust_remote_code)):
        if base is not None:
            raise DeltaMixError(f"{repo!r} is a whole model, not a delta repo: it needs no --base")
        return from_pretrained(repo, trust_remote_code)
    find_delta(repo, {})  # what is no weight file would end in an error of transformers
    settings = DeltaMixConfig(base_model=base, dequantize=dequantize)
    return from_pretrained(repo, trust_remote_code, quantization_config=settings)


def from_pretrained(repo: str, trust_remote_code: bool = False, **given: Any) -> Any:
    """Call `from_pretrained` of the class that `repo` was saved with."""
    cls = model_class(repo, read_config(repo, trust_remote_code), trust_remote_code)
    given["trust_remote_code"] = trust_remote_code
    with warnings.catch_warnings():
        # That options of loading replace the repo's is what the caller wants.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        return cls.from_pretrained(repo, device_map=best_device(), **given).eval()


def best_device() -> str | None:
    """Name a GPU if there is one; each of several processes by `torchrun` has its own."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None


def load_tokenizer(repo: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a repo; DeltaMixError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(repo, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DeltaMixError(
            f"{repo!r} has no tokenizer that can be loaded ({first_line(error)}); save it "
            "there with tokenizer.save_pretrained"
        ) from error
