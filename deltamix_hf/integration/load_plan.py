"""What is decided before transformers reads the weights of a delta repo, and needed afterwards.

The base's files are spliced into the very list that transformers is about to read:
[delta, base, delta]. So renames, expert fusion, dtype, device_map and offload stay transformers'
own. The delta comes first because disk offload indexes the first file only, and last because the
last copy of a key wins. Base keys that the delta supplies under another name, and the guards, are
hidden by a renaming of our own.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation

from ..checkpoint.base import BaseCheckpoint
from ..checkpoint.delta_repo import Contents, check_finite
from ..checkpoint.validation import check_base_was_read
from ..checkpoint.vocabulary import Feed, FitRows
from ..errors import DeltaMixError
from ..nn import tensor_parallel
from ..nn.experts import attach_experts
from ..nn.layers import attach_with_ties
from ..storage.names import ROWS
from .saving import Places

_HIDDEN = "deltamix.hidden."


class _HideKeys(WeightRenaming):
    """Rename the given checkpoint keys out of the model's sight."""

    __slots__ = ("hidden",)

    def __init__(self, hidden: set[str]):
        super().__init__(source_patterns="^$", target_patterns=_HIDDEN)
        self.hidden = hidden

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.hidden:
            return _HIDDEN + source_key.replace(".", "/"), None
        return source_key, None


class LoadPlan:
    """How transformers is to read a delta repo and its base, and what to check when it has.

    For the model that `contents` was sorted for, whose packed parameters are attached; it is loaded
    in `dtype`.
    """

    def __init__(self, contents: Contents, base: BaseCheckpoint, dtype: torch.dtype):
        model, state, supplied = contents.keys.model, contents.keys.state, contents.overlay
        self.base = base
        self.from_base = [n for n in state if n in base and n not in supplied]
        self.whole = list(supplied)  # parameters that the delta repo replaces
        # keys of both repos that no parameter is to see
        self.hidden = contents.guards | (base.hidden_keys(supplied) - {*supplied.values()})
        self.resized = _fitting_rows(contents, base) + _feeding_heads(base, supplied)
        self.dtypes = {n: t.dtype for n, t in state.items() if t.is_floating_point()}
        if plan := model._get_dtype_plan(dtype):  # parts that stay in float32
            kept, _, _ = build_glob_alternation(list(plan))
            self.dtypes = {n: d for n, d in self.dtypes.items() if not kept.search(n)}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            "^" + _HIDDEN.replace(".", r"\."),
        }

    def conversions(self, others: list[Any]) -> list[Any]:
        """Add ours to the `others` that transformers applies to what it reads."""
        if not (self.hidden or self.resized):
            return others
        return [_HideKeys(self.hidden), *self.resized, *others]

    def finish(self, model: PreTrainedModel) -> None:
        """Check and complete the model once its weights are read.

        Raises a DeltaMixError if a weight is not the base's, or one of the delta's is not finite.
        """
        _complete_offload_index(model)
        check_base_was_read(model, self.base, self.from_base)
        # transformers 5.16 to 5.19 leave renamed tensors of such repos as they were stored
        for name, dtype in self.dtypes.items():
            tensor = model.get_parameter_or_buffer(name)
            if tensor.device.type != "meta" and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        for name in self.whole:  # as it is used: what is finite in the file may not be so here
            tensor = model.get_parameter_or_buffer(name)
            if tensor.device.type != "meta":
                check_finite(name, tensor_parallel.own(tensor))
        # conversions are undone on saving, which ours need not be
        conversions: Any = getattr(model, "_weight_conversions", None) or []
        kept: Any = [c for c in conversions if c not in self.resized]
        model._weight_conversions = kept


def attach_packed(contents: Contents) -> Places:
    """Give modules and 3-D parameters, and what is tied to them, empty packed parameters.

    Returned is where the files hold them. Raises a DeltaMixError if packed tensors do not fit the
    model, or none of them belongs to it.
    """
    places: Places = {}
    model = contents.keys.model
    for name, stored in contents.packed.items():
        packed = contents.read_packed(name)
        empty, names = packed.to(torch.device("meta")), packed.names(name)
        if packed.counts is None:
            attach_with_ties(model, name, empty)
        else:
            owner, _, leaf = name.rpartition(".")
            attach_experts(model.get_submodule(owner), leaf, empty)
        places |= {names[part]: contents.infos[key] for part, key in packed.names(stored).items()}
    if contents.absent and not contents.packed:
        raise DeltaMixError(
            f"none of the matrices of the delta repo belong to a {type(model).__name__}; load "
            "it with the class it was made from"
        )
    return places


def _fitting_rows(contents: Contents, base: BaseCheckpoint) -> list[WeightConverter]:
    """Tell transformers how to make each matrix whose rows are not all the base's."""
    converters = []
    for name, found in contents.resized.items():
        weight = f"{name}.weight"
        sources = [*base.checkpoint_keys(weight), weight, found.stored or f"{name}.{ROWS}"]
        if found.stored is not None:
            check_finite(found.stored, contents.infos[found.stored].read())
        patterns = [f"^{re.escape(source)}$" for source in dict.fromkeys(sources)]
        converters.append(WeightConverter(patterns, weight, [FitRows(found.rows)]))
    return converters


def _feeding_heads(base: BaseCheckpoint, supplied: Collection[str]) -> list[WeightConverter]:
    """Tell transformers to fill untied heads that the delta changes from the base's embeddings."""
    return [
        WeightConverter([f"^{re.escape(key)}$" for key in base.checkpoint_keys(source)],
                        [source, head], [Feed()])
        for head, source in base.untied.items() if head not in supplied
    ]  # fmt: skip


def _complete_offload_index(model: PreTrainedModel) -> None:
    """Tell accelerate where tied weights lie on disk.

    transformers looks for them in the first checkpoint file only; ours is the delta's, and the
    weights are the base's.
    """
    if "disk" not in getattr(model, "hf_device_map", {}).values():
        return
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    # all hooks share one
    index: dict[str, Any] = next((m.dataset.index for m in maps if m is not None), {})
    for target, source in model.all_tied_weights_keys.items():
        if source in index:
            index.setdefault(target, index[source])
