"""A delta repo in memory, apart from any model: packed factors and overlay by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import DeltaMixConfig
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError, first_line
from ..nn.experts import expert_place, fused_weights, is_experts, matrix_shape, slice_shape
from ..nn.layers import declared_shape, weight_of
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import part_names
from ..storage.headers import TensorInfo, fingerprints, opened, read_headers
from ..storage.names import GUARD, ROWS, check_listed, is_guard, packed_names, packed_part
from ..storage.untrusted_paths import check_weight_files, repo_files
from .base import KeyMap, is_finite
from .untrusted_config import check_config
from .vocabulary import Resized, resized_in_repo

_NOT_THE_MODELS = (
    "quantization_config",
    "transformers_version",
    "transformers_weights",
    "_name_or_path",
)  # of the entries of config.json
_MOST_PARTS = 6  # of a parameter: five packed tensors, and rows that were added
_CODES = (torch.int8, torch.uint8)  # what quantized weights of other libraries look like


@dataclass(frozen=True)
class StoredDelta:
    """Packed deltas by module name, or 3-D parameter of experts; overlay by tensor name."""

    packed: dict[str, PackedDelta]
    overlay: dict[str, Tensor]
    fingerprints: dict[str, str]  # of the base it belongs to
    source: str
    content: Mapping[str, str] | None = None  # fingerprints of its own tensors, if they were asked

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        packed = sum(sum(factors.nbytes.values()) for factors in self.packed.values())
        return packed + sum(t.numel() * t.element_size() for t in self.overlay.values())

    def pinned(self) -> StoredDelta:
        """Copy to page-locked memory, which a GPU reads without the CPU; without a GPU, self."""
        if not torch.cuda.is_available():
            return self
        packed = {name: factors.pinned() for name, factors in self.packed.items()}
        overlay = {name: tensor.pin_memory() for name, tensor in self.overlay.items()}
        return replace(self, packed=packed, overlay=overlay)


def find_delta(
    repo: str, kwargs: dict[str, Any]
) -> tuple[list[str], DeltaMixConfig, dict[str, Any]]:
    """Find a delta repo, a folder or Hub id: its weight files, config, and all of config.json.

    Raises a DeltaMixError if it is not found, or no delta repo.
    """
    try:
        files, config, _ = repo_files(repo, kwargs)
    except (OSError, ValueError) as error:
        raise DeltaMixError(f"cannot find the delta repo {repo!r}: {first_line(error)}") from error
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    check_config(config)
    check_weight_files(repo, files, lambda: read_headers(files))
    return files, DeltaMixConfig.from_dict(settings), config


@dataclass(frozen=True)
class Contents:
    """A delta repo, sorted for the model of `keys`: names of the model -> names in files."""

    keys: KeyMap
    infos: Mapping[str, TensorInfo]  # the headers of its files
    config: DeltaMixConfig
    packed: dict[str, str]  # by module, or by 3-D parameter of experts
    overlay: dict[str, str]  # by tensor
    guards: set[str]  # names in the files
    resized: dict[str, Resized]  # matrices with more or fewer rows than in the base, by module
    absent: list[str]  # names in the files, of modules or tensors that the model has not

    @property
    def whole(self) -> dict[str, str]:
        """All that is not packed: overlay, and added rows by the name they have in a model."""
        rows = {f"{module}.{ROWS}": resized.stored for module, resized in self.resized.items()}
        return self.overlay | {name: stored for name, stored in rows.items() if stored}

    def experts(self, name: str) -> set[str]:
        """Name the matrices of a packed 3-D parameter that config.json lists, as it does."""
        return {own for own in self.config.errors if own.rpartition(".")[0] == self.packed[name]}

    def read_packed(self, name: str, read: Callable[[str], Tensor] | None = None) -> PackedDelta:
        """Read the delta of the module or 3-D parameter `name`, checked.

        `read` gives a stored tensor by name; without it the codes are meta tensors. Raises a
        DeltaMixError: not the tensors of such a matrix, values no compressor writes, or other
        experts than config.json lists.
        """
        stored, method, experts = self.packed[name], self.config.method, None
        get = read or self._uncoded
        if name in self.keys.state:
            owner, _, leaf = name.rpartition(".")
            module = self.keys.modules[owner]
            experts, shape = len(weight_of(module, leaf)), slice_shape(module, leaf)
        else:
            shape = declared_shape(self.keys.modules[name])
        names = part_names(stored, method.quantizer, experts is not None)
        try:
            tensors = {part: get(key) for part, key in names.items()}
            packed = PackedDelta.checked(*shape, method.group_size, tensors, experts)
        except DeltaMixError as error:
            raise DeltaMixError(f"{name}: {error}") from None
        if packed.counts is not None:
            counts, listed = enumerate(packed.counts.tolist()), self.experts(name)
            kept = {f"{stored}.{number}" for number, count in counts if count}
            if wrong := sorted(kept ^ listed):
                raise DeltaMixError(
                    f"only {'config.json' if wrong[0] in listed else 'the delta repo'} has ranks "
                    f"of {wrong[0]}: weights and config.json do not fit"
                )
        return packed

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Look up [m, n] of every compressed matrix by module name, in the model's order.

        Raises a DeltaMixError if the files hold what the model has not, or config.json names as
        dropped what is no matrix of it.
        """
        if self.absent:
            raise DeltaMixError(f"the model has no {self.absent[0]}, which the files hold")
        state, model = self.keys.state, self.keys.model
        compressed, names = {*self.config.dropped}, list[str]()
        for name in self.packed:
            experts = {f"{name}.{own.rpartition('.')[2]}" for own in self.experts(name)}
            compressed |= experts if name in state else {name}
        for name, tensor in state.items():
            if name.endswith(".weight") and tensor.ndim == 2:
                names.append(name.removesuffix(".weight"))
            elif tensor.ndim == 3 and expert_place(model, f"{name}.0"):
                names += [f"{name}.{number}" for number in range(len(tensor))]
        if unknown := sorted(compressed - {*names}):
            raise DeltaMixError(f"the model has no matrix {unknown[0]}, which config.json lists")
        return {name: matrix_shape(model, name) for name in names if name in compressed}

    def _uncoded(self, name: str) -> Tensor:
        place, info = packed_part(name), self.infos[name]
        codes = place is not None and place[2] in ("v", "u")
        return info.placeholder() if codes else info.read()


def contents_of(infos: Mapping[str, TensorInfo], config: DeltaMixConfig, keys: KeyMap) -> Contents:
    """Sort out the tensors of a delta repo for the model that `keys` are of.

    Raises a DeltaMixError: incomplete, of other shapes or kinds, or two tensors for one place.
    """
    if len(infos) > _MOST_PARTS * (len(keys.state) + 1):  # before each is looked at
        raise DeltaMixError(
            f"the delta repo holds {len(infos)} tensors, for a model of {len(keys.state)}: it does "
            "not belong to this model, or the file is damaged"
        )
    modules, fused = packed_names(infos, config.method.quantizer, config.errors)
    others = {name for name in infos if packed_part(name) is None}
    guards = {name for name in others if is_guard(name)}
    for name in guards:
        if (infos[name].placeholder().dtype, infos[name].shape) != GUARD:
            raise DeltaMixError(f"the delta repo holds {name}, which is no guard: it is damaged")
    # old repos have shorter lists
    unlisted = {*fused} - {name.rpartition(".")[0] for name in config.errors}
    check_listed(unlisted | ({*modules} - config.errors.keys() if config.errors else set()), set())
    if config.overlay is not None:
        check_listed(others - guards, {*config.overlay})
    resized = resized_in_repo(infos, config, keys)
    found = Contents(keys, infos, config, {}, {}, guards, resized, [])
    whole = sorted(n for n in others - guards if not n.endswith(f".{ROWS}"))
    stored_names = [(module, f"{module}.weight") for module in modules]
    taken: dict[str, str] = {}
    for stored, key in [*stored_names, *((name, name) for name in (*fused, *whole))]:
        name = keys.rename(key)[0]
        if name not in keys.state:
            found.absent.append(stored)
            continue
        if name in keys.model.all_tied_weights_keys:
            raise DeltaMixError(
                f"the delta repo holds {stored}, which the model ties to another: use it by itself"
            )
        if name in taken:
            raise DeltaMixError(f"the delta repo holds {taken[name]} and {stored} for one weight")
        taken[name] = stored
        if key != stored or stored in fused:
            _check_carrier(keys, stored, name, experts=key == stored)
            found.packed[name if key == stored else name.removesuffix(".weight")] = stored
        else:
            _check_whole(keys.state[name], infos[stored], stored)
            found.overlay[name] = stored
    return found


def _check_carrier(keys: KeyMap, stored: str, name: str, experts: bool) -> None:
    """Refuse a packed delta to what is no matrix, or no 3-D parameter of experts."""
    owner, _, leaf = name.rpartition(".")
    module = keys.modules[owner]
    if experts:
        fits = is_experts(module) and leaf in fused_weights(module)
    else:
        fits = leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    if not fits:
        raise DeltaMixError(f"{stored}: a {type(module).__name__} cannot carry a packed delta")


def _check_whole(ours: Tensor, info: TensorInfo, stored: str) -> None:
    """Refuse a whole tensor that has not the shape of the model's, `ours`, or is as it no float."""
    theirs = info.placeholder()
    if theirs.is_floating_point() and ours.dtype in _CODES:
        raise DeltaMixError(
            f"{stored} is stored whole, which cannot take the place of {ours.dtype}: load the base "
            "without quantization, or name this layer in its llm_int8_skip_modules or "
            "modules_to_not_convert"
        )
    fits = theirs.shape == ours.shape
    if not fits or theirs.is_floating_point() != ours.is_floating_point():
        raise DeltaMixError(
            f"{stored} of the delta repo is {info.dtype} {list(info.shape)}, the model needs "
            f"{ours.dtype} {list(ours.shape)}: weights and config.json do not fit"
        )


def check_content(infos: Mapping[str, TensorInfo], config: DeltaMixConfig) -> Mapping[str, str]:
    """Return the fingerprints of a delta repo's tensors, 0.9 s a GB on an EPYC core.

    Raises a DeltaMixError if config.json records others. It records none in repos that were made
    before it did.
    """
    check_settings(config)
    found, recorded = fingerprints(infos), config.tensor_fingerprints
    if recorded:
        check_listed(infos.keys(), recorded.keys())
        for name in differing_fingerprints(found, recorded):
            raise DeltaMixError(
                f"{name} in {infos[name].file} is not what was saved: the file is damaged, or was "
                "changed; copy or download it again"
            )
    return found


def check_settings(config: DeltaMixConfig) -> None:
    """Raise a DeltaMixError if tensors would be decoded in another way than they were saved in."""
    if config.settings_fingerprint not in (None, config.decoding_fingerprint()):
        raise DeltaMixError(
            "group_size, codebook or resized in config.json are not what was saved: the file is "
            "damaged, or was changed"
        )


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """Hash what a raw config.json says of the model, and of `dropped` matrices, which feed it.

    SHA-256, its first 32 hex digits, of all but what saving it again would change.
    """
    own = {key: value for key, value in config.items() if key not in _NOT_THE_MODELS}
    own["dropped"] = config["quantization_config"].get("dropped")
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32]


def check_finite(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise a DeltaMixError for a tensor with NaN or infinity, in `dtype` too if that is given.

    Compression never stores one.
    """
    if not is_finite(tensor):
        raise DeltaMixError(f"{name} of the delta repo holds NaN or infinity: the file is damaged")
    if dtype is not None and not is_finite(tensor, dtype):
        raise DeltaMixError(
            f"{name} of the delta repo holds {float(tensor.abs().max()):.3g}, which is infinite in "
            f"the model's {dtype}: load it in a wider dtype, or the file is damaged"
        )


def differing_fingerprints(found: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """List the tensors whose fingerprints are not those recorded."""
    return [name for name, value in found.items() if value != recorded.get(name)]


def read_delta(source: str, files: list[str], config: DeltaMixConfig, keys: KeyMap) -> StoredDelta:
    """Read a delta repo for the model of `keys`; a DeltaMixError if it is damaged or another's."""
    if config.resized:
        name, (old, new) = next(iter(config.resized.items()))
        raise DeltaMixError(
            f"the delta {source!r} has {new} rows in {name} where the base has {old}: it cannot "
            "run beside the base; load it by itself, with from_pretrained"
        )
    infos = read_headers(files)
    contents = contents_of(infos, config, keys)
    for stored in contents.absent:
        shape = list(infos[stored].shape) if stored in infos else "packed"
        raise DeltaMixError(f"{source!r} holds {stored} {shape}, the model has none such")
    content = check_content(infos, config) if config.verify_tensors else None
    overlay: dict[str, Tensor] = {}
    with opened(infos) as get:

        def read(name: str) -> Tensor:
            """A copy: every tensor of a file that is not copied maps the whole file once more."""
            return get(name).clone()

        packed = {name: contents.read_packed(name, read) for name in contents.packed}
        for name, stored in contents.overlay.items():
            overlay[name] = read(stored)
            check_finite(stored, overlay[name], keys.state[name].dtype)
    return StoredDelta(packed, overlay, config.base_fingerprints, source, content)


def read_again(read: Callable[[], StoredDelta], content: Mapping[str, str] | None) -> StoredDelta:
    """Read a delta once more; a DeltaMixError if its tensors are not those of `content`."""
    found = read()
    if found.content != content:
        raise DeltaMixError(
            f"{found.source!r} has changed since it was loaded: delete the delta, and load it again"
        )
    return found
