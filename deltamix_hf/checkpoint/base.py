"""The frozen base checkpoint: found, checked, and read tensor by tensor under the model's names.

Checkpoint keys and model parameter names differ: transformers renames keys, adds or drops the
base model's prefix, fuses experts, splits fused projections. `BaseCheckpoint` runs the model's own
conversions on just the keys of one parameter, so one matrix of the base at a time is in memory.
Only safetensors are read.
"""

from collections.abc import Container, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import DeltaMixConfig
from ..errors import DeltaMixError, first_line
from ..storage.headers import TensorInfo, fingerprints, read_headers
from ..storage.names import GUARD_SEPARATOR
from ..storage.untrusted_paths import CONFIG, WEIGHTS, check_base_name, repo_files
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

    Raises a DeltaMixError: no base given, not found, without safetensors, or itself quantized.
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
    """Resolve the base that a delta repo names, or its user; `file` is a weight file of the repo.

    Raises a DeltaMixError as `resolve_base`, or for a name that is not for the repo to give.
    """
    if not config.base_given:
        check_base_name(config.base_model, config.base_revision, repo, file)
    return resolve_base(config.base_model, config.base_revision, config.base_kwargs)


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Give the tensors of a model's state by name, but for those that are tied to others."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


class KeyMap:
    """Which checkpoint keys feed which parameter of `model`, under the model's own conversions."""

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.model = model
        self.modules = dict(model.named_modules())  # adapters may come and rename them
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
    """Lazy reader of a checkpoint by the parameter names of `model`, whose weights may be meta.

    `of_base`: the embeddings of a base without a head are also the base of a head that `model` has
    and could tie to them: `untied` has their names, head -> embeddings.
    """

    def __init__(self, files: list[str], model: PreTrainedModel, of_base: bool = False):
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
            self._group[name] = name
            if pattern is not None:
                first, *others = self.keys.converter(pattern).target_patterns
                self._group |= {name.replace(first, other, 1): name for other in others}
        self._check_ties()
        self.untied: dict[str, str] = {}
        for head, source in (getattr(model, "_tied_weights_keys", None) or {}).items():
            shapes = [getattr(self.keys.state.get(name), "shape", None) for name in (head, source)]
            plain = source in self._group and self.is_plain(source) and head not in self._group
            free = plain and head not in model.all_tied_weights_keys and shapes[0] == shapes[1]
            if of_base and free and self.shape(source) == shapes[1]:
                self._group[head], self.untied[head] = source, source

    def _check_ties(self) -> None:
        """Raise a DeltaMixError if the model ties what the files hold as two that differ.

        Or as three: transformers would take one of them, and nobody has said which.
        """
        for name, source in self.keys.model.all_tied_weights_keys.items():
            if name not in self or source not in self:
                continue
            file = self._first(name).file
            for tied in (name, source):
                if not self._is_made(tied) and len(keys := self.checkpoint_keys(tied)) > 1:
                    raise DeltaMixError(
                        f"{file} holds {' and '.join(keys)} for {tied}, which the model ties: "
                        "remove all but one"
                    )
            if not same(self.read(name), self.read(source)):
                raise DeltaMixError(
                    f"the model ties {name} to {source}, but {file} holds two "
                    "tensors that differ: save the fine-tune untied, with tie_word_embeddings="
                    "False in its config and a weight of its own for each"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def feed_only(self, modules: Container[str]) -> None:
        """Let only those untied heads be made of embeddings that are among these modules."""
        for head in [h for h in self.untied if h.removesuffix(".weight") not in modules]:
            del self.untied[head], self._group[head]

    def supplies(self, name: str) -> bool:
        """Tell whether the base holds the parameter, or one that the model ties to it."""
        ties = self.keys.model.all_tied_weights_keys.items()
        return name in self or any(s == name and t in self for t, s in ties)

    def checkpoint_keys(self, name: str) -> list[str]:
        """List checkpoint keys that feed the parameter `name` (several where experts are fused)."""
        return [key for key, _ in self.sources[self._group[name]]]

    def _first(self, name: str) -> TensorInfo:
        return self.infos[self.checkpoint_keys(name)[0]]

    def check(self, name: str, shape: tuple[int, ...], recorded: Mapping[str, str]) -> None:
        """Check that the parameter `name` of this shape may be filled from the base.

        Raises a DeltaMixError: no fingerprint is `recorded`, another shape, or two tensors for it.
        """
        keys = self.checkpoint_keys(name)
        self.check_pinned(name, recorded)
        for key in keys:
            self.infos[key].placeholder()  # refuses unknown dtypes
        if self._is_made(name):
            return
        if len(keys) > 1 or self.infos[keys[0]].shape != shape:
            raise DeltaMixError(
                f"the base holds {' and '.join(keys)} {list(self.infos[keys[0]].shape)} for "
                f"{name}, the model needs {list(shape)}: config.json is of another model"
            )

    def check_pinned(self, name: str, recorded: Mapping[str, str]) -> None:
        """Raise a DeltaMixError unless fingerprints are `recorded` of what feeds a parameter."""
        for key in self.checkpoint_keys(name):
            if key not in recorded:
                raise DeltaMixError(
                    f"wrong base: the delta repo has no fingerprint of its {key!r}; give the right "
                    "one as DeltaMixConfig(base_model=..., base_revision=...)"
                )

    def check_all_pinned(self, replaced: Container[str], recorded: Mapping[str, str]) -> None:
        """Check, as `check_pinned`, all that the model has of the base, but what is `replaced`."""
        for name in self.keys.state:
            if name in self and name not in replaced:
                self.check_pinned(name, recorded)

    def fingerprints(self, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Fingerprint some of the base's tensors; each is hashed once for all deltas."""
        missing = {key: info for key, info in infos.items() if key not in self._fingerprints}
        self._fingerprints |= fingerprints(missing)
        return {key: self._fingerprints[key] for key in infos}

    def _is_made(self, name: str) -> bool:
        """Tell whether transformers makes the parameter of what is stored, mostly of several."""
        return any(pattern for _, pattern in self.sources[self._group[name]])

    def is_plain(self, name: str) -> bool:
        """Tell whether the parameter is one stored tensor, untouched but for its name."""
        source = self.sources[self._group[name]]
        return len(source) == 1 and source[0][1] is None

    def read(self, name: str) -> Tensor:
        """Read a parameter in the base's dtype, on the CPU; DeltaMixError if the base has none."""
        if name not in self:
            raise DeltaMixError(f"the base has no tensor for {name!r}")
        if self.is_plain(name):
            found = self._first(name).read()
            if name not in self._resized:
                return found
            whole = self._resized[name]
            added = whole[len(found) :].to(found.device, found.dtype)
            return torch.cat([found[: len(whole)], added])
        first = self._group[name]
        converter = self.keys.converter(self.sources[first][0][1])
        for key, pattern in self.sources[first]:
            converter.add_tensor(first, key, str(pattern), self.infos[key].read())
        model = self.keys.model
        value = converter.convert(first, model=model, config=model.config)[name]
        return value[0] if isinstance(value, list) else value

    def read_expert(self, name: str, number: int) -> Tensor:
        """Read a matrix of a 3-D parameter, as `read`; the parameter read last stays in memory."""
        if self._fused is None or self._fused[0] != name:
            self._fused = name, self.read(name)
        return self._fused[1][number]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Look up a parameter's shape in the files; None if it is made from several tensors."""
        return self._first(name).shape if self.is_plain(name) else None

    def resize(self, name: str, whole: Tensor) -> Tensor | None:
        """Let `read` give the base's rows of `name`, cut off or continued by those of `whole`.

        For vocabularies that were resized: returned are the rows that the base has not, the
        fine-tune's own, or None if there are none.
        """
        self._resized[name] = whole
        added = whole[self._first(name).shape[0] :]
        return added if len(added) else None

    @property
    def resized(self) -> dict[str, list[int]]:
        """Rows in the base and in the fine-tune of what was resized, by module name."""
        return {
            name.removesuffix(".weight"): [self._first(name).shape[0], len(whole)]
            for name, whole in self._resized.items()
        }

    def hidden_keys(self, names: Iterable[str]) -> set[str]:
        """List base keys to hide because a delta has the parameters `names` under other keys."""
        supplied = {*names} - self.untied.keys()
        return {key for n in supplied if n in self for key in self.checkpoint_keys(n)} - supplied


def guard_names(model: PreTrainedModel, base: BaseCheckpoint, stored: Container[str]) -> list[str]:
    """Name the guards of a delta repo that holds the tensors `stored`; none if it needs no base.

    transformers strips "<prefix><any character>" from a key when the rest is a model key, so stock
    loading maps "<prefix>:<weight>" onto the real weight and stops on the shape mismatch [1], while
    the colon keeps the guard from being a real key of any repo. The weight is a matrix read from
    the base: neither tied nor stored, and not of a head that other classes lack. One guard is for
    classes whose keys have the prefix, the other for those without (AutoModel).
    """
    matrices = [name for name, tensor in untied_state(model).items() if tensor.ndim == 2]
    weights = [name for name in matrices if name in base and name not in stored]
    prefix = model.base_model_prefix
    inside = f"{prefix}."
    first = [*(name for name in weights if name.startswith(inside)), *weights][:1]
    inner = [name.removeprefix(inside) for name in first]
    return [f"{prefix}{GUARD_SEPARATOR}{key}" for name in inner for key in (name, inside + name)]


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether a tensor holds no NaN or infinity, once it is cast to `dtype`.

    0.07 s for a gigabyte of bfloat16 on one AMD EPYC core (`isfinite().all()`: 3.9 s).
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch cannot order 8 bits
    ends = torch.stack(wide.aminmax())  # both are NaN if one element is
    return bool(torch.isfinite(ends.to(dtype or ends.dtype)).all())


@torch.no_grad()
def same(tensor: Tensor, base: Tensor) -> bool:
    """Tell whether a model tensor equals the base's value once that is cast to its dtype."""
    if tensor.shape != base.shape:
        return False
    return torch.equal(tensor, base.to(device=tensor.device, dtype=tensor.dtype))
