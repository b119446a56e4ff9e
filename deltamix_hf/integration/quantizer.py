"""`DeltaMixHfQuantizer`: the only module that touches transformers' quantizer hooks.

Compress on load: transformers loads the fine-tune as usual; the after-hook compresses it against
the base and turns the modules into their delta counterparts.

Load a delta repo: the before-hook attaches empty packed parameters as the file headers say, checks
the base, and splices its files into what transformers is about to read (`load_plan`).
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.base import BaseCheckpoint, KeyMap, find_base, resolve_base
from ..checkpoint.delta_repo import check_content, contents_of
from ..checkpoint.validation import base_checks
from ..compression.model import compress
from ..compression.runs import Source
from ..config import DeltaMixConfig
from ..constants import ACCESS, FETCHING, NOTICE
from ..errors import DeltaMixError
from ..jobs.resume_store import ResumeStore
from ..nn import tensor_parallel
from ..nn.layers import delta_modules, detach_all
from ..nn.merging import merged_weights
from ..nn.shared_input import link_shared_inputs
from ..storage.headers import read_headers
from ..storage.names import is_guard, packed_part
from ..storage.untrusted_paths import WEIGHTS, check_weight_files, commit_of
from .load_plan import LoadPlan, attach_packed
from .saving import Places, add_methods, delta_state_dict, remove_methods, stored_without_base


class DeltaMixHfQuantizer(HfQuantizer):
    """Hooks of quant_method "deltamix". See the module docstring for the two ways it is used."""

    is_trainable = True  # gradients flow through x, so adapters on top train
    is_compileable = True
    quantization_config: DeltaMixConfig

    def __init__(self, quantization_config: DeltaMixConfig, **kwargs: Any):
        # Compression writes fingerprints into the config: never into the caller's own object.
        super().__init__(copy.copy(quantization_config), **kwargs)
        given = {name: value for name, value in FETCHING.get().items() if name in ACCESS}
        self.quantization_config.base_kwargs = given | self.quantization_config.base_kwargs
        self.base_files: list[str] = []
        self.source: Source | None = None  # of compression, if transformers did not load it
        self.seconds: dict[str, float] = {}  # of compression, by stage
        self.store = ResumeStore()  # of compression: removed when the delta is saved
        self.stored: dict[str, torch.Tensor] | None = None  # of a model without its base's weights
        self.commit: str | None = None  # of the repo being loaded; its tokenizer is saved along
        self.delta_files: list[str] = []  # of the repo that was loaded
        self.content: Mapping[str, str] | None = None  # fingerprints of its tensors, if asked
        self._plan: LoadPlan | None = None  # from the before-hook to the after-hook
        self._places: Places = {}  # of packed parameters that processes share
        self._dtype = torch.get_default_dtype()  # the one asked for

    # What transformers asks before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:  # else it depends on where the delta repo is: not known yet
            config = self.quantization_config
            found = resolve_base(config.base_model, config.base_revision, config.base_kwargs)
            self._use_base(*found)

    def _use_base(self, files: list[str], commit: str | None) -> None:
        """Note where the base is, and its commit if it has one."""
        config, self.base_files = self.quantization_config, files
        if commit is not None:
            config.base_revision = commit
        if config.base_model and os.path.isdir(config.base_model):
            config.base_model = os.path.abspath(config.base_model)  # found from other folders too

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Take out of the model's config, in the first hook that sees it, what stops loading."""
        if getattr(config, "transformers_weights", None) == NOTICE:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.16 has only this one

    def is_serializable(self) -> bool:
        return True

    # Loading a delta repo

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.commit = commit_of(checkpoint_files[0]) if checkpoint_files else None
        config, kinds = self.quantization_config, tensor_parallel.wanted(model)
        tensor_parallel.check_wanted(kinds, config, not self.pre_quantized)
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise DeltaMixError("a delta repo is loaded from its own files; no state_dict, please")
        if named := getattr(model.config, "transformers_weights", None):
            raise DeltaMixError(f"config.json has its weights in {named!r}, not in {WEIGHTS}")
        repo, delta_files = str(model.config.name_or_path), list(checkpoint_files)
        infos = read_headers(delta_files)
        check_weight_files(repo, delta_files, lambda: infos)
        contents = contents_of(infos, config, KeyMap(model))
        self.delta_files = delta_files
        self.content = check_content(infos, config) if config.verify_tensors else None
        places = attach_packed(contents)
        self._use_base(*find_base(config, repo, delta_files[0]))
        base = BaseCheckpoint(self.base_files, model, of_base=True)
        for check in base_checks(contents, base):
            raise DeltaMixError(check.problem)
        if kinds:
            tensor_parallel.plan_packed(model, set(contents.resized))
            self._places = places
        self._plan = LoadPlan(contents, base, self._dtype)
        checkpoint_files[:] = [*delta_files, *self.base_files, *delta_files]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        return self._plan.conversions(weight_conversions) if self._plan else weight_conversions

    # After loading, both ways

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            plan, self._plan = self._plan, None
            assert plan is not None
            plan.finish(model)
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
            source = self.source or Source(model, self.commit)
            base = BaseCheckpoint(self.base_files, model, of_base=True)
            self.commit = source.commit
            self.seconds, self.store, overlay = compress(source, base, self.quantization_config)
            if source.files is not None:
                self.stored = stored_without_base(model, base, overlay)
        if tensor_parallel.is_sharded(model):
            tensor_parallel.keep_own_part(model)
        else:  # which needs the factors of several layers while one of them runs
            link_shared_inputs(model)
            for module in delta_modules(model).values():
                vars(module)["dm_visible"] = True
        # transformers makes every float parameter trainable while loading
        model.requires_grad_(False)
        # what we save is in model form already
        model._weight_conversions = []  # type: ignore[assignment]
        add_methods(model)
        return model

    # Dense again

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # save_pretrained leaves config.dtype a string
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dense: dict[int, nn.Parameter] = {}
        advice = "load the delta repo without offload to merge"
        for module, leaf, merged in merged_weights(model, advice):
            if id(merged) not in dense:
                dense[id(merged)] = nn.Parameter(merged, requires_grad=False)
            setattr(module, leaf, dense[id(merged)])
        detach_all(model)
        if wanted is not None and wanted != model.dtype:
            nn.Module.to(model, dtype=wanted)
        remove_methods(model)
        for tensor in model.parameters():  # as from_pretrained leaves them
            tensor.requires_grad_(tensor.is_floating_point())
        for part in model.modules():  # an encoder's config is a copy, which transformers leaves
            config: Any = getattr(part, "config", None)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        return model

    # Saving

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        stored = self.stored
        if stored is None:
            base = BaseCheckpoint(self.base_files, model, of_base=True)
            stored = delta_state_dict(model, base, self._places)
        packed = {place[0] for n in stored if (place := packed_part(n))}
        listed = self.quantization_config.errors  # of experts each has a number
        lost = [n for n in listed if packed.isdisjoint((n, n.rpartition(".")[0]))]
        if lost:
            raise DeltaMixError(
                f"a {type(model).__name__} lacks {lost[0]}, which the delta changes: save the "
                "class that was compressed, or call model.dequantize() first"
            )
        whole = [n for n in stored if not is_guard(n) and packed_part(n) is None]
        self.quantization_config.overlay = sorted(whole)
        return stored, {}
