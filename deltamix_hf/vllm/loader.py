"""The model loader: a delta repo's base and its delta as one stream of weights.

It takes the place of vLLM's loader for the load format "auto", and only hands delta repos on
otherwise: everything that is no delta repo is vLLM's own to load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..checkpoint.base import find_base
from ..checkpoint.delta_repo import StoredDelta, find_delta
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError
from .repo import BaseRepo, check_arrived, finding_places

_OPTIONS = ("base_model", "base_revision")  # of --model-loader-extra-config


class DeltaMixModelLoader(DefaultModelLoader):
    """vLLM's default loader, which knows delta repos too."""

    def __init__(self, load_config: Any):
        self.given: dict[str, Any] = {}
        extra = load_config.model_loader_extra_config
        if isinstance(extra, dict):
            self.given = {name: extra[name] for name in _OPTIONS if name in extra}
            load_config = copy.copy(load_config)
            others = {name: value for name, value in extra.items() if name not in _OPTIONS}
            load_config.model_loader_extra_config = others
        super().__init__(load_config)
        self.delta: StoredDelta | None = None

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Read the weights of base and delta into the model.

        Raises DeltaMixError if the base is another one, not found or not for a delta repo to name,
        or if the delta repo is damaged.
        """
        if not is_delta_repo(model_config):
            super().load_weights(model, model_config)
            return
        self.enable_weights_track = True  # every weight must come from somewhere
        with finding_places(model):
            super().load_weights(model, model_config)
        assert self.delta is not None
        check_arrived(model, self.delta)
        self.delta = None

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield names of a checkpoint and tensors, packed ones among them."""
        if not is_delta_repo(model_config):
            yield from super().get_all_weights(model_config, model)
            return
        kwargs = {"revision": model_config.revision, "cache_dir": self.load_config.download_dir}
        files, settings, _ = find_delta(model_config.model, kwargs)
        if settings.resized:
            raise DeltaMixError(
                f"{model_config.model!r} has another number of tokens than its base, which is not "
                "known here: serve what 'deltamix merge' makes of it"
            )
        if self.given:
            settings.base_model = self.given.get("base_model", settings.base_model)
            settings.base_revision = self.given.get("base_revision")
            settings.base_given = "base_model" in self.given
        settings.base_kwargs = {"cache_dir": self.load_config.download_dir}
        try:
            base_files, _ = find_base(settings, model_config.model, files[0])
            base = BaseRepo(base_files, model_config.hf_config, str(settings.base_model))
            self.delta = base.read(model_config.model, files, settings)
        except DeltaMixError as error:
            raise DeltaMixError(
                f"{error} (in vLLM, DeltaMixConfig's base_model and base_revision are given as "
                '--model-loader-extra-config \'{"base_model": "..."}\')'
            ) from None
        yield from base.with_delta(self.delta)


def is_delta_repo(model_config: Any) -> bool:
    """Tell whether the model is a delta repo, and not a base that is to serve many."""
    settings = getattr(model_config.hf_config, "quantization_config", None)
    return model_config.quantization == QUANT_METHOD and settings is not None


def use_our_loader() -> None:
    """Register `DeltaMixModelLoader` where vLLM would load by its own."""
    if not isinstance(get_model_loader(LoadConfig()), DeltaMixModelLoader):
        register_model_loader("auto")(DeltaMixModelLoader)
