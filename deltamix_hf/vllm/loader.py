"""The model loader: a delta repo's base and its delta as one stream of weights.

It takes the place of vLLM's loader for the load format "auto", and only hands delta repos on
otherwise: everything that is no delta repo is vLLM's own to load.

Tensors of a delta repo have the names that transformers' model gives them, vLLM's models expect
those of a checkpoint. So the base's checkpoint lends the names: what a delta puts in place of one
of its tensors, or beside it, takes that tensor's key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from ..checkpoint.base import BaseCheckpoint, find_base
from ..checkpoint.delta_repo import StoredDelta, find_delta, read_delta
from ..checkpoint.model_class import empty_model
from ..checkpoint.validation import check_filled
from ..config import DeltaMixConfig
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError, first_line
from ..quantization.packed_layout import PREFIX
from ..storage.headers import check_base
from .layers import deltas_of

_OPTIONS = ("base_model", "base_revision")  # of --model-loader-extra-config


class BaseRepo:
    """The base of one or more deltas: its safetensors files, and vLLM's model config."""

    def __init__(self, files: list[str], config: Any, name: str):
        self.where = repr(name)
        # Without weights; of a copy, because making a model writes into its config.
        with set_default_torch_dtype(config.dtype):  # in which whole tensors must be finite
            model = empty_model(name, copy.deepcopy(config.hf_config))
        self.checkpoint = BaseCheckpoint(files, model)

    def read(self, source: str, files: list[str], settings: DeltaMixConfig) -> StoredDelta:
        """Read a delta; DeltaMixError if it is of another base or model, damaged or incomplete."""
        recorded = settings.base_fingerprints
        check_base(recorded, self.checkpoint.infos, self.where, self.checkpoint.fingerprints)
        found = read_delta(source, files, settings, self.checkpoint.keys)
        self.checkpoint.check_all_pinned(found.overlay, recorded)
        return found

    def changes(self, delta: StoredDelta) -> list[tuple[str, Tensor]]:
        """Name whole and packed tensors of a delta as the base's checkpoint does."""
        found = [(self._key(name), tensor) for name, tensor in delta.overlay.items()]
        for name, factors in delta.packed.items():
            weight = name if factors.counts is not None else f"{name}.weight"
            names = factors.names(self._key(weight).removesuffix(".weight"))
            found += [(names[part], tensor) for part, tensor in factors.tensors.items()]
        return found

    def with_delta(self, delta: StoredDelta) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's tensors but for those that the delta replaces, then the delta's."""
        base = self.checkpoint
        for name in check_filled(base.keys, delta.overlay, base, delta.fingerprints, {}):
            raise DeltaMixError(
                f"neither {delta.source!r} nor {self.where} holds {name!r}: the delta repo is "
                "incomplete"
            )
        changes = self.changes(delta)
        replaced = {name for name, _ in changes}
        for key, info in base.infos.items():
            if key in delta.fingerprints and key not in replaced:
                yield key, info.read()
        yield from changes

    def _key(self, name: str) -> str:
        """Look up the base's key for a tensor of the model; its own name if the base has none."""
        if name not in self.checkpoint:
            return name
        if not self.checkpoint.is_plain(name):
            raise DeltaMixError(
                f"the delta changes {name}, which transformers makes from several tensors of the "
                "base: vLLM would not find it; 'deltamix merge' the delta repo and serve that"
            )
        return self.checkpoint.checkpoint_keys(name)[0]


@contextmanager
def finding_places(model: nn.Module) -> Iterator[None]:
    """Context manager: a DeltaMixError if vLLM's loading finds no layer for a packed matrix."""
    try:
        yield
    except DeltaMixError:
        raise
    except (ValueError, KeyError) as error:
        if PREFIX not in str(error):
            raise
        raise DeltaMixError(
            f"vLLM's {type(model).__name__} has a plain module where the delta repo has a packed "
            f"matrix: serve what 'deltamix merge' makes of it [{first_line(error)}]"
        ) from error


def check_arrived(model: nn.Module, delta: StoredDelta) -> None:
    """Raise a DeltaMixError if layers of vLLM's model took fewer packed matrices than there are."""
    places = deltas_of(model).values()
    arrived = [part.keys() for _, deltas in places for part in deltas.incoming.values()]
    wanted = [factors.tensors.keys() for factors in delta.packed.values()]
    if len(arrived) != len(wanted) or any(found not in wanted for found in arrived):
        raise DeltaMixError(
            f"{len(arrived)} of {len(wanted)} packed matrices of {delta.source!r} found a layer in "
            f"vLLM's {type(model).__name__} on this rank (pipeline parallelism is not supported): "
            "serve what 'deltamix merge' makes of it"
        )


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
            base = BaseRepo(base_files, model_config, str(settings.base_model))
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
