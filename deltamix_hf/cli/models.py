"""Loading models for the commands: with the class a repo was saved with, on a GPU if any."""

from __future__ import annotations

from typing import Any

from ..errors import DeltaMixError


def load_model(repo: str, base: str | None = None, dequantize: bool = False) -> Any:
    """A whole model or a delta repo, ready to run.

    Args:
        repo: path or Hub id.
        base: where the base of a delta repo is, if not where the repo says.
        dequantize: turn a delta repo into a plain dense model.

    Raises:
        DeltaMixError: not found, of a class transformers has not, or a base given for what is no
            delta repo.
    """
    from .. import DeltaMixConfig

    if not is_delta(read_config(repo)):
        if base is not None:
            raise DeltaMixError(f"{repo!r} is a whole model, not a delta repo: it needs no --base")
        return from_pretrained(repo)
    settings = DeltaMixConfig(base_model=base, dequantize=dequantize)
    return from_pretrained(repo, quantization_config=settings)


def from_pretrained(repo: str, **given: Any) -> Any:
    """`from_pretrained` of the class that `repo` was saved with."""
    import torch
    import transformers

    config = read_config(repo)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise DeltaMixError(
            f"config.json of {repo!r} names {names or 'no architecture'}, which this transformers "
            f"{transformers.__version__} has not: upgrade it, or check the repo"
        )
    device = "cuda" if torch.cuda.is_available() else None
    return cls.from_pretrained(repo, device_map=device, **given).eval()


def read_config(repo: str) -> Any:
    """The transformers config of a repo.

    Raises:
        DeltaMixError: it cannot be found or read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(repo)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or ["no config.json"]
        raise DeltaMixError(f"cannot find the model {repo!r}: {lines[0]}") from error


def is_delta(config: Any) -> bool:
    """Whether a transformers config is a delta repo's."""
    from ..config import QUANT_METHOD

    settings = getattr(config, "quantization_config", None) or {}
    return dict(settings).get("quant_method") == QUANT_METHOD


def load_tokenizer(repo: str) -> Any:
    """The tokenizer of a repo.

    Raises:
        DeltaMixError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(repo)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DeltaMixError(
            f"{repo!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); save it "
            "there with tokenizer.save_pretrained"
        ) from error
