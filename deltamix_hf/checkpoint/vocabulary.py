"""Fine-tunes with more or fewer tokens than their base.

W_base of an embedding or head is then made of the base's rows, cut off where the fine-tune ends or
followed by the rows that only the fine-tune has, which the delta repo stores whole as `dm_rows`. So
ΔW is zero there, and everything else is as for any matrix. Only the model's input embedding and
output head may differ so: any other shape means another base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..storage.headers import LONGEST_NAME, TensorInfo
from ..storage.names import ROWS, check_listed
from ..transformers_private import ConversionOps
from .base import KeyMap


@dataclass(frozen=True)
class Resized:
    """Rows of a matrix in the base and in the fine-tune; the added ones' name in the files."""

    base: int
    rows: int
    stored: str | None


class FitRows(ConversionOps):
    """Join the base's rows and, below them, those the delta repo adds; at most `rows`."""

    def __init__(self, rows: int):
        self.rows = rows

    @torch.no_grad()
    def convert(
        self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        found = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        tensors = [t for value in found for t in (value if isinstance(value, list) else [value])]
        return {target_patterns[0]: torch.cat(tensors)[: self.rows]}


class Feed(ConversionOps):
    """Give one tensor to every target, each its own copy."""

    @torch.no_grad()
    def convert(
        self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        (found,) = (v for v in input_dict.values())
        value = found[-1] if isinstance(found, list) else found
        return {target: value.clone() for target in target_patterns}


def vocabulary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Find the input embedding and the output head, by name: a row or output for each token."""
    try:
        ends = [id(model.get_input_embeddings()), id(model.get_output_embeddings())]
    except NotImplementedError:  # a model of sound or pictures
        return {}
    return {name: module for name, module in model.named_modules() if id(module) in ends}


def resized_in_repo(
    infos: Mapping[str, TensorInfo], config: DeltaMixConfig, keys: KeyMap
) -> dict[str, Resized]:
    """Read and check what config.json says of resized matrices, by the model's module name.

    A head that the class lacks is left out. Raises a DeltaMixError if rows are missing, of another
    number than announced, or no tokens'.
    """
    found: dict[str, Resized] = {}
    ends = vocabulary_modules(keys.model)
    announced = {f"{name}.{ROWS}" for name, (old, new) in config.resized.items() if new > old}
    stored = {name for name in infos if name.endswith(f".{ROWS}")}
    check_listed(stored, announced)
    for listed, (old, new) in config.resized.items():
        if len(listed) > LONGEST_NAME:
            raise DeltaMixError(f"config.json says that {listed[:80]} ... was resized")
        weight = keys.rename(f"{listed}.weight")[0]
        if weight not in keys.state:
            continue
        module, ours = weight.removesuffix(".weight"), keys.state[weight]
        if module in found:
            raise DeltaMixError(f"config.json says twice that {module} was resized: it is damaged")
        if module not in ends or ours.ndim != 2 or len(ours) != new:
            raise DeltaMixError(
                f"config.json says that {listed} was resized to {new} rows, which the model's "
                "vocabulary was not: it is damaged, or of another model"
            )
        name = f"{listed}.{ROWS}" if new > old else None
        if name is not None:
            info, shape = infos[name], (new - old, ours.shape[1])
            if info.shape != shape or not info.placeholder().is_floating_point():
                raise DeltaMixError(
                    f"{name} of the delta repo is {info.dtype} {list(info.shape)}, config.json "
                    f"announces {list(shape)}: the file is damaged"
                )
        found[module] = Resized(old, new, name)
    return found
