"""`DeltaMixHfQuantizer`: the only module that touches transformers' quantizer hooks.

Compress on load: transformers loads the fine-tune as usual; the after-hook compresses it against
the base and turns the modules into their delta counterparts.

Load a delta repo: the before-hook attaches empty packed parameters as the file headers say, checks
the base, and splices the base's files into the very list transformers is about to read:
[delta, base, delta]. So renames, expert fusion, dtype, device_map and offload stay transformers'
own. The delta comes first because disk offload indexes the first file only, and last because the
last copy of a key wins. Base keys that the delta supplies under another name, and the guards, are
hidden by a renaming of our own.
"""

from __future__ import annotations

import copy
import os
import re
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
)
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.base import BaseCheckpoint, KeyMap, commit_of, resolve_base
from ..checkpoint.delta_repo import (
    Contents,
    check_finite,
    contents_of,
    read_packed,
    without_codes,
)
from ..checkpoint.validation import check_base_was_read, check_parts_fit, checked_headers
from ..checkpoint.vocabulary import FitRows
from ..compression.model import compress
from ..compression.runs import Source
from ..config import DeltaMixConfig
from ..constants import NOTICE
from ..errors import DeltaMixError, first_line
from ..jobs.resume_store import ResumeStore
from ..nn import tensor_parallel
from ..nn.experts import attach_experts, delta_experts
from ..nn.layers import (
    DeltaModule,
    attach_with_ties,
    delta_modules,
    detach,
    untie_packed,
    weight_of,
)
from ..nn.shared_input import link_shared_inputs
from ..storage.headers import TensorInfo, read_tensor
from ..storage.names import ROWS, is_guard, packed_part
from .saving import delta_state_dict, install_save, stored_without_base, uninstall_save

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


class DeltaMixHfQuantizer(HfQuantizer):
    """Hooks of quant_method "deltamix". See the module docstring for the two ways it is used."""

    requires_calibration = False
    quantization_config: DeltaMixConfig

    def __init__(self, quantization_config: DeltaMixConfig, **kwargs: Any):
        # Compression writes fingerprints into the config: never into the caller's own object.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.base_files: list[str] = []
        self.source: Source | None = None  # of compression, if transformers did not load it
        self.seconds: dict[str, float] = {}  # of compression, by stage
        self.store = ResumeStore()  # of compression: removed when the delta is saved
        self.stored: dict[str, torch.Tensor] | None = None  # of a model without its base's weights
        self.commit: str | None = None  # of the repo being loaded; its tokenizer is saved along
        self._hidden: set[str] = set()
        self._base: BaseCheckpoint | None = None  # from the before-hook to the after-hook
        self._from_base: list[str] = []
        self._whole: list[str] = []  # what the delta repo replaces
        # where packed tensors lie in the files, if processes share them: name -> name there
        self._factors: dict[str, tuple[TensorInfo, str]] = {}
        self._resized: list[WeightConverter] = []  # of matrices with more or fewer rows
        self._dtype = torch.get_default_dtype()  # the one asked for
        self._dtypes: dict[str, torch.dtype] = {}  # what transformers should have cast to

    # What transformers asks before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:  # else it depends on where the delta repo is: not known yet
            self._find_base()

    def _find_base(self) -> None:
        config = self.quantization_config
        self.base_files, commit = resolve_base(
            config.base_model, config.base_revision, config.base_kwargs
        )
        if commit is not None:
            config.base_revision = commit
        if config.base_model and os.path.isdir(config.base_model):
            config.base_model = os.path.abspath(config.base_model)  # found from other folders too

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The first hook that sees the model's config: take out what stops loading without us."""
        if getattr(config, "transformers_weights", None) == NOTICE:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.16 has only this one

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # gradients flow through x, so adapters on top train

    @property
    def is_compileable(self) -> bool:
        return True

    # Loading a delta repo

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.commit = commit_of(checkpoint_files[0]) if checkpoint_files else None
        kinds = tensor_parallel.wanted(model)
        tensor_parallel.check_wanted(kinds, self.quantization_config, not self.pre_quantized)
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise DeltaMixError("a delta repo is loaded from its own files; no state_dict, please")
        delta_files = list(checkpoint_files)
        infos = checked_headers(model, delta_files, self.quantization_config, self.commit)
        keys = KeyMap(model)
        contents = contents_of(infos, self.quantization_config, keys)
        places: dict[str, tuple[TensorInfo, str]] = {}
        for name, stored in contents.packed.items():
            places |= self._attach_placeholders(keys, name, stored, infos)
        if contents.absent and not contents.packed:
            raise DeltaMixError(
                f"none of the matrices of the delta repo belong to a {type(model).__name__}; load "
                "it with the class it was made from"
            )
        self._find_base()
        base = BaseCheckpoint(self.base_files, model)
        check_parts_fit(model, keys, contents, base, self.quantization_config)
        supplied, overlay = contents.overlay, set(contents.overlay.values())
        self._hidden = contents.guards | (base.hidden_keys(supplied) - overlay)
        self._resized = self._fitting_rows(contents, base, infos)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            "^" + _HIDDEN.replace(".", r"\."),
        }
        if kinds:
            tensor_parallel.plan_packed(model, set(contents.resized))
            self._factors = places
        self._base = base
        self._from_base = [n for n in keys.state if n in base and n not in supplied]
        self._whole = list(supplied)
        self._dtypes = {n: t.dtype for n, t in keys.state.items() if t.is_floating_point()}
        if plan := model._get_dtype_plan(self._dtype):  # parts that stay in float32
            kept, _, _ = build_glob_alternation(list(plan))
            self._dtypes = {n: d for n, d in self._dtypes.items() if not kept.search(n)}
        checkpoint_files[:] = [*delta_files, *self.base_files, *delta_files]

    def _attach_placeholders(
        self, keys: KeyMap, name: str, stored: str, infos: dict[str, TensorInfo]
    ) -> dict[str, tuple[TensorInfo, str]]:
        """Give the module or 3-D parameter `name`, and what is tied to it, meta parameters.

        Returns:
            Where the files hold them: parameter name -> (info, name there).
        """
        packed = read_packed(keys, name, stored, self.quantization_config, without_codes(infos))
        empty, names = packed.to(torch.device("meta")), packed.names(name)
        if packed.counts is None:
            attach_with_ties(keys.model, name, empty)
        else:
            owner, _, leaf = name.rpartition(".")
            attach_experts(keys.model.get_submodule(owner), leaf, empty)
        return {names[part]: (infos[key], key) for part, key in packed.names(stored).items()}

    def _fitting_rows(
        self, contents: Contents, base: BaseCheckpoint, infos: dict[str, TensorInfo]
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

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        if not (self._hidden or self._resized):
            return weight_conversions
        return [_HideKeys(self._hidden), *self._resized, *weight_conversions]

    # After loading, both ways

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            _complete_offload_index(model)
            base, self._base = self._base, None
            assert base is not None
            check_base_was_read(model, base, self._from_base)
            for name in self._whole:
                tensor = model.get_parameter_or_buffer(name)
                if tensor.device.type != "meta":
                    check_finite(name, tensor_parallel.own(tensor))
            self._cast_renamed(model)
            conversions: Any = getattr(model, "_weight_conversions", None) or []
            # they are undone on saving, which ours need not be
            kept: Any = [c for c in conversions if c not in self._resized]
            model._weight_conversions = kept
            if self.quantization_config.dequantize:
                return self._dequantize(model)
        else:
            devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
            if len(devices) > 1 or "disk" in devices:
                raise DeltaMixError(
                    f"compressing needs the whole fine-tune on one device, device_map put it on "
                    f"{sorted(devices)}; compress with device_map='cpu' (or one GPU), save, and "
                    "load the delta repo with any device_map"
                )
            self._compress(self.source or Source(model, self.commit))
        if tensor_parallel.is_sharded(model):
            tensor_parallel.keep_own_part(model)
        else:  # which needs the factors of several layers while one of them runs
            link_shared_inputs(model)
        # transformers makes every float parameter trainable while loading
        model.requires_grad_(False)
        # what we save is in model form already
        model._weight_conversions = []  # type: ignore[assignment]
        install_save(model)
        model.resize_token_embeddings = MethodType(_resize, model)  # type: ignore[method-assign]
        return model

    def _cast_renamed(self, model: PreTrainedModel) -> None:
        """Cast what transformers 5.16 to 5.19 leave as stored: renamed tensors of such repos."""
        for name, dtype in self._dtypes.items():
            tensor = model.get_parameter_or_buffer(name)
            if tensor.device.type != "meta" and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)

    def _compress(self, source: Source) -> None:
        base, config = BaseCheckpoint(self.base_files, source.model), self.quantization_config
        outcome = compress(source, base, config)
        self.commit, self.seconds, self.store = source.commit, outcome.seconds, outcome.store
        if source.files is not None:
            self.stored = stored_without_base(source.model, base, config, outcome.overlay)

    # Dense again

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # save_pretrained leaves config.dtype a string
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        merged: dict[int, nn.Parameter] = {}
        modules = delta_modules(model)
        experts = delta_experts(model)
        weights = {name: weight_of(module) for name, module in modules.items()}
        for name, mixture in experts.items():
            weights |= {f"{name}.{leaf}": w for leaf, w in mixture.frozen_weights().items()}
        for name, weight in weights.items():
            if weight.device.type == "meta":
                raise DeltaMixError(
                    f"{name} is offloaded; load the delta repo without offload to merge"
                )
        for module in modules.values():
            # tied modules share one merged weight, as they shared the base's
            key = id(module.weight)
            if key not in merged:
                merged[key] = nn.Parameter(module.merged_weight(), requires_grad=False)
            module.weight = merged[key]
            detach(module)
        for mixture in experts.values():
            mixture.merge()
        untie_packed(model)
        if wanted is not None and wanted != model.dtype:
            nn.Module.to(model, dtype=wanted)
        uninstall_save(model)
        model.__dict__.pop("resize_token_embeddings", None)
        return model

    # Saving

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        stored = self.stored
        if stored is None:
            base = BaseCheckpoint(self.base_files, model)
            stored = delta_state_dict(model, base, self._whole_factor)
        whole = [n for n in stored if not is_guard(n) and packed_part(n) is None]
        self.quantization_config.overlay = sorted(whole)
        return stored, {}

    def _whole_factor(self, name: str, held: torch.Tensor) -> torch.Tensor:
        """A packed tensor, read again from the delta repo if this process holds a part of it."""
        if name not in self._factors:
            return held
        try:
            return read_tensor(*self._factors[name])
        except OSError as error:
            raise DeltaMixError(
                "a model shared out among processes is saved from the delta repo it was loaded "
                f"from, which is gone: {first_line(error)}"
            ) from error


def _resize(
    self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """`resize_token_embeddings`, which makes new modules and so would drop the delta unseen."""
    ends = (self.get_input_embeddings(), self.get_output_embeddings())
    same_size = new_num_tokens in (None, weight_of(ends[0]).shape[0]) and not (args or kwargs)
    if any(isinstance(module, DeltaModule) for module in ends) and not same_size:
        raise DeltaMixError(
            "the embeddings carry a packed delta and cannot be resized; resize the fine-tune "
            "before compressing it, or call model.dequantize() first"
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


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
