"""What is refused while a delta repo is loaded: files, base and model that do not fit together."""

from __future__ import annotations

import os
from collections.abc import Iterable

from transformers import PreTrainedModel

from . import sharding
from .base import BaseCheckpoint, KeyMap, same
from .config import DeltaMixConfig
from .delta_repo import Contents
from .errors import DeltaMixError
from .format import TensorInfo, check_base, read_headers
from .trust import WEIGHTS, check_base_name, check_weight_files


def checked_headers(
    model: PreTrainedModel, files: list[str], config: DeltaMixConfig, commit: str | None
) -> dict[str, TensorInfo]:
    """Headers of the repo's weight files, which are opened once they are known to be its own.

    Raises:
        DeltaMixError: weight files, or a base, that are not for this delta repo to name.
    """
    repo = str(model.config.name_or_path)
    if named := getattr(model.config, "transformers_weights", None):
        raise DeltaMixError(f"config.json has its weights in {named!r}, not in {WEIGHTS}")
    infos = read_headers(files)
    check_weight_files(repo, files, infos)
    if not config.base_given:
        from_hub = commit is not None or not os.path.exists(repo)
        check_base_name(config.base_model, config.base_revision, from_hub)
    return infos


def check_parts_fit(
    model: PreTrainedModel,
    keys: KeyMap,
    contents: Contents,
    base: BaseCheckpoint,
    config: DeltaMixConfig,
) -> None:
    """Refuse a base that is another one, and a model that base and delta do not fill."""
    recorded = config.base_fingerprints
    where, kind = repr(config.base_model), type(model).__name__
    check_base(recorded, base.infos, where)
    elsewhere = contents.overlay.keys() | set(model.all_tied_weights_keys)
    wanted = {name: tensor for name, tensor in keys.state.items() if name not in elsewhere}
    for name, tensor in wanted.items():
        if name in base:
            shape = tuple(tensor.shape)
            if resized := contents.resized.get(name.removesuffix(".weight")):
                shape = resized.base, *shape[1:]
            base.check(name, shape, recorded)
    missing = [name for name in wanted if not base.supplies(name)]
    # Another class than the saved one may lack its head, or bring one of its own, which
    # transformers initialises and reports. Of the model inside every part must be complete.
    saved = model.config.architectures
    same_class = isinstance(saved, list | tuple) and kind in saved
    filled = {_part_inside(model, name) for name in keys.state.keys() - set(missing)} - {None}
    for name in contents.absent:
        if same_class or _part_inside(model, name) is not None:
            raise DeltaMixError(
                f"the delta repo holds {name}, which this {kind} has not: weights and "
                "config.json do not fit"
            )
    for name in missing:
        if same_class or _part_inside(model, name) in filled:
            raise DeltaMixError(
                f"neither the delta repo nor the base {where} holds {name!r}: the delta repo "
                "is incomplete"
            )
    made_up = sum(keys.state[name].numel() for name in missing)
    if 2 * made_up > sum(tensor.numel() for tensor in keys.state.values()):
        raise DeltaMixError(
            f"most of this {kind} is neither in the delta repo nor in the base {where}: its "
            "config.json is of another model"
        )


def check_base_was_read(model: PreTrainedModel, base: BaseCheckpoint, names: Iterable[str]) -> None:
    """The net under the splice: the weights `names` of the loaded model must be the base's."""
    for name in names:
        tensor = model.get_parameter_or_buffer(name)
        info = base.infos[base.checkpoint_keys(name)[0]]
        # offloaded, sharded or converted on the way: not comparable by eye
        if tensor.device.type == "meta" or tuple(tensor.shape) != info.shape:
            continue
        if sharding.is_shard(tensor):
            continue
        if tensor.ndim and base.is_plain(name) and not same(tensor[:1], base.first_row(name)):
            raise DeltaMixError(
                f"{name} was not loaded from the base: this transformers version reads "
                "checkpoints in a way deltamix_hf does not know; please report it"
            )


def _part_inside(model: PreTrainedModel, name: str) -> str | None:
    """`layers` of `model.layers.0.mlp.up_proj`; None for what is no part of the base model."""
    part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return part if part in dict(model.base_model.named_children()) else None
