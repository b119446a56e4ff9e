"""What is decided before transformers reads the weights of a delta repo, and needed afterwards.

The base's files are spliced into the very list that transformers is about to read:
[delta, base, delta]. So renames, expert fusion, dtype, device_map and offload stay transformers'
own. The delta comes first because disk offload indexes the first file only, and last because the
last copy of a key wins. Base keys that the delta supplies under another name, and the guards, are
hidden by a renaming of our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
)

from ..checkpoint.base import BaseCheckpoint, KeyMap
from ..checkpoint.delta_repo import Contents, check_finite, read_packed, without_codes
from ..checkpoint.validation import check_base_was_read
from ..checkpoint.vocabulary import FitRows
from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..nn import tensor_parallel
from ..nn.experts import attach_experts
from ..nn.layers import attach_with_ties
from ..storage.headers import TensorInfo, read_tensor
from ..storage.names import ROWS
from .saving import Places

_HIDDEN = "deltamix.hidden."


class _HideKeys(WeightRenaming):
    """Renames the given checkpoint keys out of the model's sight."""

    __slots__ = ("hidden",)

    def __init__(self, hidden: set[str]):
        super().__init__(source_patterns="^$", target_patterns=_HIDDEN)
        self.hidden = hidden

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.hidden:
            return _HIDDEN + source_key.replace(".", "/"), None
        return source_key, None


@dataclass
class LoadPlan:
    """How transformers is to read a delta repo and its base, and what to check when it has.

    Attributes:
        base: the checkpoint that most weights come from.
        from_base: parameters that must be the base's afterwards.
        whole: parameters that the delta repo replaces.
        hidden: keys of both repos that no parameter is to see.
        resized: how matrices with more or fewer rows than the base's are put together.
        dtypes: what every parameter must be cast to.
    """

    base: BaseCheckpoint
    from_base: list[str]
    whole: list[str]
    hidden: set[str]
    resized: list[WeightConverter]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(
        cls,
        keys: KeyMap,
        contents: Contents,
        base: BaseCheckpoint,
        infos: Mapping[str, TensorInfo],
        dtype: torch.dtype,
    ) -> LoadPlan:
        """Plan for the model that `keys` are of, whose packed parameters are attached.

        Args:
            contents: what the delta repo holds; `infos` are its headers.
            dtype: the one the model is loaded in.
        """
        model, supplied = keys.model, contents.overlay
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            "^" + _HIDDEN.replace(".", r"\."),
        }
        dtypes = {n: t.dtype for n, t in keys.state.items() if t.is_floating_point()}
        if plan := model._get_dtype_plan(dtype):  # parts that stay in float32
            kept, _, _ = build_glob_alternation(list(plan))
            dtypes = {n: d for n, d in dtypes.items() if not kept.search(n)}
        return cls(
            base=base,
            from_base=[n for n in keys.state if n in base and n not in supplied],
            whole=list(supplied),
            hidden=contents.guards | (base.hidden_keys(supplied) - {*supplied.values()}),
            resized=_fitting_rows(contents, base, infos),
            dtypes=dtypes,
        )

    def conversions(self, others: list[Any]) -> list[Any]:
        """Add ours to the `others` that transformers applies to what it reads."""
        if not (self.hidden or self.resized):
            return others
        return [_HideKeys(self.hidden), *self.resized, *others]

    def finish(self, model: PreTrainedModel) -> None:
        """Check and complete the model once its weights are read.

        Raises:
            DeltaMixError: a weight is not the base's, or one of the delta repo's is not finite.
        """
        _complete_offload_index(model)
        check_base_was_read(model, self.base, self.from_base)
        for name in self.whole:
            tensor = model.get_parameter_or_buffer(name)
            if tensor.device.type != "meta":
                check_finite(name, tensor_parallel.own(tensor))
        # transformers 5.16 to 5.19 leave renamed tensors of such repos as they were stored
        for name, dtype in self.dtypes.items():
            tensor = model.get_parameter_or_buffer(name)
            if tensor.device.type != "meta" and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        # conversions are undone on saving, which ours need not be
        conversions: Any = getattr(model, "_weight_conversions", None) or []
        kept: Any = [c for c in conversions if c not in self.resized]
        model._weight_conversions = kept


def attach_packed(
    keys: KeyMap, contents: Contents, config: DeltaMixConfig, infos: Mapping[str, TensorInfo]
) -> Places:
    """Give modules and 3-D parameters, and what is tied to them, empty packed parameters.

    Returns:
        Where the files hold them.

    Raises:
        DeltaMixError: packed tensors do not fit the model, or none of them belongs to it.
    """
    places: Places = {}
    for name, stored in contents.packed.items():
        packed = read_packed(keys, name, stored, config, without_codes(infos))
        empty, names = packed.to(torch.device("meta")), packed.names(name)
        if packed.counts is None:
            attach_with_ties(keys.model, name, empty)
        else:
            owner, _, leaf = name.rpartition(".")
            attach_experts(keys.model.get_submodule(owner), leaf, empty)
        places |= {names[part]: (infos[key], key) for part, key in packed.names(stored).items()}
    if contents.absent and not contents.packed:
        raise DeltaMixError(
            f"none of the matrices of the delta repo belong to a {type(keys.model).__name__}; load "
            "it with the class it was made from"
        )
    return places


def _fitting_rows(
    contents: Contents, base: BaseCheckpoint, infos: Mapping[str, TensorInfo]
) -> list[WeightConverter]:
    """How transformers makes a matrix whose rows are not all the base's."""
    converters = []
    for name, found in contents.resized.items():
        weight = f"{name}.weight"
        sources = [*base.checkpoint_keys(weight), weight, found.stored or f"{name}.{ROWS}"]
        if found.stored is not None:
            check_finite(found.stored, read_tensor(infos[found.stored], found.stored))
        patterns = [f"^{re.escape(source)}$" for source in dict.fromkeys(sources)]
        converters.append(WeightConverter(patterns, weight, [FitRows(found.rows)]))
    return converters


def _complete_offload_index(model: PreTrainedModel) -> None:
    """Tell accelerate where tied weights lie on disk.

    transformers looks for them in the first checkpoint file only; ours is the delta's, and the
    weights are the base's.
    """
    if "disk" not in getattr(model, "hf_device_map", {}).values():
        return
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    maps = [getattr(hook, "weights_map", None) for hook in hooks]
    found = [weights_map.dataset.index for weights_map in maps if weights_map is not None]
    for index in found[:1]:  # all hooks share one
        for target, source in model.all_tied_weights_keys.items():
            if source in index:
                index.setdefault(target, index[source])
