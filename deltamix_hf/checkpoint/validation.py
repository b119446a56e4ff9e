"""Check that a delta repo is sound and that its base is the right one.

`verify_repo` reports all that is wrong, without building a model. Loading makes the same checks of
files, base and model (`checked_headers`, `check_parts_fit`, `check_base_was_read`) and stops at the
first that fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..nn import tensor_parallel
from ..storage.headers import TensorInfo, check_base, fingerprint, read_headers
from ..storage.sizes import size_report
from ..storage.untrusted_paths import WEIGHTS, check_base_name, check_weight_files
from .base import BaseCheckpoint, KeyMap, resolve_base, same
from .delta_repo import Contents, check_finite, contents_of, find_delta, read_packed
from .model_class import empty_model
from .report import stored_shapes

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `problem` says what is wrong with it, if anything is."""

    what: str
    problem: str | None = None


def verify_repo(repo: str, base: str | None = None, quick: bool = False) -> Iterator[Check]:
    """Check a delta repo and its base; the list ends where nothing more can be read.

    Args:
        repo: folder or Hub id.
        base: where the base is, if not where the repo says.
        quick: compare only the names of the base's tensors; its bytes are not read.
    """
    try:
        files, config = find_delta(repo, {})
        infos = read_headers(files)
        keys = KeyMap(empty_model(repo))
        contents = contents_of(infos, config, keys)
        shapes = stored_shapes(contents, config, keys)
    except DeltaMixError as error:
        yield Check("config.json and weight files", str(error))
        return
    yield Check(f"format {config.format_version}: {len(infos)} tensors, {len(files)} files")
    with ExitStack() as stack:
        handles = {f: stack.enter_context(safe_open(f, framework="pt")) for f in files}

        def read(name: str) -> Tensor:
            tensor: Tensor = handles[infos[name].file].get_tensor(name)
            return tensor

        yield from _matrices(contents, config, keys, read)
        yield from _overlay(contents, read)
    yield _budget(files, config, shapes)
    yield _base(repo, config, base, quick)


def _matrices(
    contents: Contents,
    config: DeltaMixConfig,
    keys: KeyMap,
    read: Read,
) -> Iterator[Check]:
    sound = 0
    bar = logging.tqdm(contents.packed.items(), desc="Reading matrices", unit="matrix")
    for name, stored in bar:
        try:
            packed = read_packed(keys, name, stored, config, read)
            sound += 1 if packed.counts is None else int((packed.counts > 0).sum())
        except DeltaMixError as error:
            yield Check(name, str(error))
    yield Check(f"{sound} packed matrices: shapes, widths, scales")


def _overlay(contents: Contents, read: Read) -> Iterator[Check]:
    sound = 0
    for name, stored in contents.whole.items():
        try:
            check_finite(stored, read(stored))
            sound += 1
        except DeltaMixError as error:
            yield Check(name, str(error))
    yield Check(f"{sound} tensors stored whole: shapes, finite values")


def _budget(
    files: list[str], config: DeltaMixConfig, shapes: Mapping[str, tuple[int, int]]
) -> Check:
    """The promise that config.json makes of the files' size; files that are not read count too."""
    try:
        size = size_report(Path(files[0]).parent, shapes)
    except DeltaMixError as error:
        return Check("bytes of weight files", str(error))
    promised = config.budget(size.reference)
    what = f"{size.total:,} bytes of weight files, {size.ratio:.5f} of bf16"
    if size.total <= promised:
        return Check(what)
    return Check(what, f"config.json promises at most {promised:,}: the files were changed")


def _base(repo: str, config: DeltaMixConfig, base: str | None, quick: bool) -> Check:
    name, revision = (config.base_model, config.base_revision) if base is None else (base, None)
    pinned = config.base_fingerprints
    what = f"base {name!r}: {len(pinned)} tensors" + (", names alone" if quick else "")
    try:
        if base is None:
            check_base_name(name, revision, from_hub=not os.path.isdir(repo))
        files, _ = resolve_base(name, revision, {})
        check_base(pinned, read_headers(files), repr(name), _recorded(pinned, quick))
    except DeltaMixError as error:
        return Check(what, str(error))
    return Check(what)


def _recorded(
    pinned: Mapping[str, str], quick: bool
) -> Callable[[Mapping[str, TensorInfo]], Mapping[str, str]]:
    """How `check_base` gets the fingerprints of the base's tensors."""

    def hashed(infos: Mapping[str, TensorInfo]) -> Mapping[str, str]:
        whole = sum(info.end - info.start for info in infos.values())
        bar = logging.tqdm(total=whole, desc="Hashing the base", unit="B", unit_scale=True)
        found = {}
        for name, info in infos.items():
            found[name] = fingerprint(info)
            bar.update(info.end - info.start)
        bar.close()
        return found

    return (lambda infos: {name: pinned[name] for name in infos}) if quick else hashed


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
        if tensor_parallel.is_shard(tensor):
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
