"""A delta repo in memory, apart from any model: packed factors and overlay by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .base import KeyMap, repo_files
from .config import QUANT_METHOD, DeltaMixConfig
from .errors import DeltaMixError
from .format import PREFIX, is_guard, packed_modules, read_headers
from .packed import PackedFactors, check_parts, layout_of, parts


@dataclass(frozen=True)
class StoredDelta:
    """Packed factors by module name and overlay tensors by tensor name, as a model names them."""

    packed: dict[str, PackedFactors]
    overlay: dict[str, Tensor]
    fingerprints: dict[str, str]  # of the base it belongs to
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        packed = sum(sum(factors.nbytes.values()) for factors in self.packed.values())
        return packed + sum(t.numel() * t.element_size() for t in self.overlay.values())

    def pinned(self) -> StoredDelta:
        """The same in page-locked memory, which a GPU reads without the CPU; or, without one, self.

        Safetensors maps files lazily: what is to come back fast must be read now anyway.
        """
        if not torch.cuda.is_available():
            return self
        packed = {name: factors.pinned() for name, factors in self.packed.items()}
        overlay = {name: tensor.pin_memory() for name, tensor in self.overlay.items()}
        return replace(self, packed=packed, overlay=overlay)


def find_delta(repo: str, kwargs: dict[str, Any]) -> tuple[list[str], DeltaMixConfig]:
    """Weight files and config of a delta repo, a local folder or on the Hub.

    Raises:
        DeltaMixError: not found, or not a delta repo.
    """
    try:
        files, config, _ = repo_files(repo, kwargs)
    except (OSError, ValueError) as error:
        raise DeltaMixError(
            f"cannot find the delta repo {repo!r}: {str(error).splitlines()[0]}"
        ) from error
    settings = config.get("quantization_config") or {}
    if settings.get("quant_method") != QUANT_METHOD:
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    return files, DeltaMixConfig.from_dict(settings)


def read_delta(source: str, files: list[str], config: DeltaMixConfig, keys: KeyMap) -> StoredDelta:
    """Read a delta repo for the model that `keys` are of.

    Raises:
        DeltaMixError: damaged, incomplete, or of another model.
    """
    infos = read_headers(files)
    handles = {file: safe_open(file, framework="pt") for file in files}

    def read(name: str) -> Tensor:
        """A copy: every tensor of a file that is not copied maps the whole file once more."""
        return handles[infos[name].file].get_tensor(name).clone()

    gaussian = config.codebook == "gaussian"
    modules = packed_modules(infos, gaussian, config.errors)
    packed: dict[str, PackedFactors] = {}
    for stored in modules:
        name = keys.rename(f"{stored}.weight")[0].removesuffix(".weight")
        if f"{name}.weight" not in keys.state:
            raise DeltaMixError(f"the model has no {name}, which {source!r} changes")
        m, n = keys.state[f"{name}.weight"].shape
        tensors = {part: read(f"{stored}.{PREFIX}{part}") for part in parts(gaussian)}
        try:
            runs, group_sizes = layout_of(tensors["ranks"], config.group_size)
            check_parts(m, n, runs, group_sizes, tensors)
        except DeltaMixError as error:
            raise DeltaMixError(f"{name}: {error}") from None
        packed[name] = PackedFactors(m, n, group_sizes, runs, **tensors)
    overlay: dict[str, Tensor] = {}
    ours = {f"{stored}.{PREFIX}{part}" for stored in modules for part in parts(gaussian)}
    for stored in infos.keys() - ours:
        if is_guard(stored):
            continue
        name = keys.rename(stored)[0]
        value = read(stored)
        if name not in keys.state or keys.state[name].shape != value.shape:
            has = list(keys.state[name].shape) if name in keys.state else "none such"
            raise DeltaMixError(
                f"{source!r} holds {stored} {list(value.shape)}, the model has {has}"
            )
        overlay[name] = value
    return StoredDelta(packed, overlay, config.base_fingerprints, source)
