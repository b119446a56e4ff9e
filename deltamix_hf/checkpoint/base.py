"""The frozen base checkpoint: found, checked, and read tensor by tensor under the model's names.

Checkpoint keys and model parameter names differ: transformers renames keys, adds or drops the
base model's prefix, fuses experts, splits fused projections. `BaseCheckpoint` runs the model's own
conversions on just the keys of one parameter, so one matrix of the base at a time is in memory.
Only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, cached_files

from ..config import DeltaMixConfig
from ..errors import DeltaMixError, first_line
from ..storage.headers import TensorInfo, fingerprints, read_headers, read_tensor
from ..storage.untrusted_paths import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_base_name,
    commit_of,
    is_from_hub,
    read_index,
    read_object,
)
from ..transformers_private import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


def resolve_base(
    base_model: str | None, revision: str | None, base_kwargs: dict[str, Any]
) -> tuple[list[str], str | None]:
    """Find the base's weight files and the commit they come from (None for a local folder).

    Raises:
        DeltaMixError: no base given, not found, without safetensors, or itself quantized.
    """
    if not base_model:
        raise DeltaMixError("no base model given; pass DeltaMixConfig(base_model=<path or Hub id>)")
    try:
        files, config, commit = repo_files(base_model, {**base_kwargs, "revision": revision})
    except (OSError, ValueError) as error:
        raise DeltaMixError(
            f"cannot find the base model {base_model!r} (revision {revision or 'main'}): it needs "
            f"{CONFIG} and {WEIGHTS}. If it lies elsewhere or needs a token, "
            "pass DeltaMixConfig(base_model=..., base_kwargs={'token': ...}). "
            f"[{first_line(error)}]"
        ) from error
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise DeltaMixError(
            f"the base {base_model!r} is itself quantized ({method}); give the plain base model"
        )
    return files, commit


def find_base(config: DeltaMixConfig, repo: str, file: str) -> tuple[list[str], str | None]:
    """`resolve_base`, of what a delta repo names, or its user.

    Args:
        repo: the delta repo, a folder or Hub id; `file` is one of its weight files.

    Raises:
        DeltaMixError: as `resolve_base`, or a name that is not for the repo to give.
    """
    if not config.base_given:
        check_base_name(config.base_model, config.base_revision, is_from_hub(repo, file))
    return resolve_base(config.base_model, config.base_revision, config.base_kwargs)


def repo_files(repo: str, kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any], str | None]:
    """Find a repo's weight files, config.json's content and commit (None for a local folder).

    Where there are a whole file and shards, the whole file counts, as in transformers.

    Raises:
        OSError, ValueError: not found, or not readable.
    """
    path = cached_file(repo, CONFIG, **kwargs)
    if path is None:
        raise OSError(f"no file {CONFIG}")
    commit = commit_of(path)
    kwargs = kwargs | {"revision": commit or kwargs.get("revision")}  # the rest from this very one
    config = read_object(path)
    whole = cached_file(repo, WEIGHTS, _raise_exceptions_for_missing_entries=False, **kwargs)
    if whole is not None:
        return [whole], config, commit
    index = cached_file(repo, INDEX, _raise_exceptions_for_missing_entries=False, **kwargs)
    if index is None:
        raise OSError(f"no file {WEIGHTS}")
    files = cached_files(repo, sorted(set(read_index(index).values())), **kwargs)
    return files or [], config, commit


class KeyMap:
    """Which checkpoint keys feed which parameter of `model`, under the model's own conversions."""

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.model = model
        # Shapes and dtypes: the tensors themselves would stay in memory when the model moves away.
        self.state = {name: t.to("meta") for name, t in model.state_dict().items()}

    def rename(self, key: str) -> tuple[str, str | None]:
        """Give a checkpoint key (or model name) its model name and its converter's pattern."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.state)
        if name not in self.state:
            plain, _ = rename_source_key(key, [], [], prefix, self.state)
            if plain in self.state:
                return plain, None
        return name, pattern

    def converter(self, pattern: str | None) -> WeightConverter:
        return deepcopy(next(c for c in self.converters if pattern in c.source_patterns))


class BaseCheckpoint:
    """Lazy reader of the base by model parameter name.

    Args:
        files: safetensors files of the base.
        model: the model whose parameter names and conversions apply (meta weights are fine).
    """

    def __init__(self, files: list[str], model: PreTrainedModel):
        self.infos: dict[str, TensorInfo] = read_headers(files)
        self.keys = KeyMap(model)
        self.sources: dict[str, list[tuple[str, str | None]]] = {}  # model name -> (key, pattern)
        self._group: dict[str, str] = {}  # model name -> first target of its converter
        self._resized: dict[str, Tensor] = {}  # model name -> the fine-tune's, of other rows
        self._fused: tuple[str, Tensor] | None = None  # read last by `read_expert`
        self._fingerprints: dict[str, str] = {}  # of checkpoint keys, once asked for
        for key in sorted(self.infos, key=dot_natural_key):  # the order transformers fuses in
            name, pattern = self.keys.rename(key)
            if name not in self.keys.state:
                continue
            self.sources.setdefault(name, []).append((key, pattern))
            for target in self._targets(name, pattern):
                self._group[target] = name

    def _targets(self, name: str, pattern: str | None) -> list[str]:
        if pattern is None:
            return [name]
        targets = self.keys.converter(pattern).target_patterns
        return [name.replace(targets[0], target, 1) for target in targets]

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def supplies(self, name: str) -> bool:
        """Tell whether the base holds the parameter, or one that the model ties to it."""
        ties = self.keys.model.all_tied_weights_keys.items()
        return name in self or any(s == name and t in self for t, s in ties)

    def checkpoint_keys(self, name: str) -> list[str]:
        """List checkpoint keys that feed the parameter `name` (several where experts are fused)."""
        return [key for key, _ in self.sources[self._group[name]]]

    def check(self, name: str, shape: tuple[int, ...], recorded: Mapping[str, str]) -> None:
        """Refuse to fill the parameter `name` of this shape from what `recorded` does not vouch.

        Raises:
            DeltaMixError: no fingerprint of it is recorded, or it is of another shape or twice.
        """
        keys = self.checkpoint_keys(name)
        for key in keys:
            if key not in recorded:
                raise DeltaMixError(
                    f"wrong base: the delta repo has no fingerprint of its {key!r}; give the right "
                    "one as DeltaMixConfig(base_model=..., base_revision=...)"
                )
            self.infos[key].placeholder()  # refuses unknown dtypes
        if any(pattern for _, pattern in self.sources[self._group[name]]):
            return  # transformers makes it from several
        if len(keys) > 1 or self.infos[keys[0]].shape != shape:
            raise DeltaMixError(
                f"the base holds {' and '.join(keys)} {list(self.infos[keys[0]].shape)} for "
                f"{name}, the model needs {list(shape)}: config.json is of another model"
            )

    def fingerprints(self, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Fingerprint some of the base's tensors; each is hashed once for all deltas."""
        missing = {key: info for key, info in infos.items() if key not in self._fingerprints}
        self._fingerprints |= fingerprints(missing)
        return {key: self._fingerprints[key] for key in infos}

    def is_plain(self, name: str) -> bool:
        """Tell whether the parameter is one stored tensor, untouched but for its name."""
        source = self.sources[self._group[name]]
        return len(source) == 1 and source[0][1] is None

    def read(self, name: str) -> Tensor:
        """Read the base's value of the parameter `name`, in the base's dtype, on the CPU.

        Raises:
            DeltaMixError: the base has no such tensor.
        """
        if name not in self:
            raise DeltaMixError(f"the base has no tensor for {name!r}")
        if self.is_plain(name):
            found = read_tensor(self.infos[key := self.sources[name][0][0]], key)
            if name not in self._resized:
                return found
            whole = self._resized[name]
            added = whole[len(found) :].to(found.device, found.dtype)
            return torch.cat([found[: len(whole)], added])
        first = self._group[name]
        converter = self.keys.converter(self.sources[first][0][1])
        for key, pattern in self.sources[first]:
            converter.add_tensor(first, key, str(pattern), read_tensor(self.infos[key], key))  # type: ignore[arg-type]
        model = self.keys.model
        realised = converter.convert(first, model=model, config=model.config)
        value = realised[name]
        return value[0] if isinstance(value, list) else value

    def read_expert(self, name: str, number: int) -> Tensor:
        """Read a matrix of a 3-D parameter, as `read`; the parameter read last stays in memory."""
        if self._fused is None or self._fused[0] != name:
            self._fused = name, self.read(name)
        return self._fused[1][number]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Look up a parameter's shape in the files; None if it is made from several tensors."""
        return self.infos[self.checkpoint_keys(name)[0]].shape if self.is_plain(name) else None

    def rows(self, name: str) -> int:
        """Look up the first dimension of a plain parameter in the base's files."""
        return self.infos[self.checkpoint_keys(name)[0]].shape[0]

    def resize(self, name: str, whole: Tensor) -> None:
        """Let `read` give the base's rows of `name`, cut off or continued by those of `whole`.

        For vocabularies that were resized: rows that the base has not are the fine-tune's own.
        """
        self._resized[name] = whole

    @property
    def resized(self) -> dict[str, list[int]]:
        """Rows in the base and in the fine-tune of what was resized, by module name."""
        return {
            name.removesuffix(".weight"): [self.rows(name), len(whole)]
            for name, whole in self._resized.items()
        }

    def added(self, name: str) -> Tensor | None:
        """Cut out the rows of a resized parameter that the base has not; None if there are none."""
        if name not in self._resized:
            return None
        rows = self._resized[name][self.rows(name) :]
        return rows if len(rows) else None

    def first_row(self, name: str) -> Tensor:
        """Read the first row of a plain, at least 1-d parameter."""
        key = self.checkpoint_keys(name)[0]
        with safe_open(self.infos[key].file, framework="pt") as handle:
            return handle.get_slice(key)[:1]

    def hidden_keys(self, names: Iterable[str]) -> set[str]:
        """List base keys to hide because a delta has the parameters `names` under other keys."""
        return {key for name in names if name in self for key in self.checkpoint_keys(name)} - set(
            names
        )


def weights_from_base(
    model: PreTrainedModel, base: BaseCheckpoint, stored: Container[str]
) -> list[str]:
    """List the matrices that a delta repo leaves to the base: neither tied nor stored whole."""
    away = set(model.all_tied_weights_keys)
    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2 and name in base and name not in stored and name not in away
    ]


@torch.no_grad()
def same(tensor: Tensor, base: Tensor) -> bool:
    """Tell whether a model tensor equals the base's value once that is cast to its dtype."""
    if tensor.shape != base.shape:
        return False
    return torch.equal(tensor, base.to(device=tensor.device, dtype=tensor.dtype))
