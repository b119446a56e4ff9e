"""Check that a delta repo is sound and that its base is the right one.

Checks come as streams. `verify_repo` lists all that is wrong, without building a model; loading
asks the same of files, base and model and stops at the first problem.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..nn import tensor_parallel
from ..storage.headers import TensorInfo, check_base, fingerprints, opened, read_headers
from ..storage.names import check_listed
from ..storage.sizes import size_report
from .base import BaseCheckpoint, KeyMap, find_base, same
from .delta_repo import (
    Contents,
    check_finite,
    check_settings,
    contents_of,
    differing_fingerprints,
    find_delta,
    model_fingerprint,
)
from .model_class import empty_model
from .vocabulary import Resized

Measure = Callable[[Mapping[str, TensorInfo]], Mapping[str, str]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `problem` says what is wrong with it, if anything is."""

    what: str
    problem: str | None = None


def verify_repo(
    repo: str, base: str | None = None, quick: bool = False, trust_remote_code: bool = False
) -> Iterator[Check]:
    """Check a delta repo and its base; the list ends where nothing more can be read.

    Args:
        repo: folder or Hub id.
        base: where the base is, if not where the repo says.
        quick: compare only the names of the base's tensors; its bytes are not read.
        trust_remote_code: run the repo's own code for its model.
    """
    try:
        files, config, raw = find_delta(repo, {})
        infos = read_headers(files)
        model = empty_model(repo, trust_remote_code=trust_remote_code)
        contents = contents_of(infos, config, KeyMap(model))
        shapes = contents.shapes()
    except DeltaMixError as error:
        yield Check("config.json and weight files", str(error))
        return
    yield Check(f"format {config.format_version}: {len(infos)} tensors, {len(files)} files")
    yield from _content(infos, config)
    if config.model_fingerprint not in (None, model_fingerprint(raw)):
        yield Check(
            "config.json",
            "its settings of the model are not what was saved: the file is damaged, or was changed",
        )
    dtype: Any = model.config.dtype  # that it is loaded in, if nothing is said
    dtype = dtype.get("") if isinstance(dtype, Mapping) else dtype  # one for each part
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with opened(infos) as read:

        def matrices(name: str, stored: str) -> int:
            return sum(one is not None for one in contents.read_packed(name, read).split())

        def whole(name: str, stored: str) -> int:
            check_finite(stored, read(stored), dtype)
            return 1

        yield from _each("packed matrices: shapes, widths, scales", contents.packed, matrices)
        yield from _each("tensors stored whole: shapes, finite values", contents.whole, whole)
    yield _size(files, config, shapes)
    if base is not None:
        config.base_model, config.base_revision, config.base_given = base, None, True
    recorded = config.base_fingerprints
    what = f"base {config.base_model!r}: {len(recorded)} tensors"
    what += ", names alone" if quick else ""
    try:
        found = find_base(config, repo, files[0])[0]
        checkpoint = BaseCheckpoint(found, contents.keys.model, of_base=True)

        def measure(infos: Mapping[str, TensorInfo]) -> Mapping[str, str]:
            return {n: recorded[n] for n in infos} if quick else fingerprints(infos, show=True)

        checks = [*base_checks(contents, checkpoint, measure)]
        yield from checks or [Check(what)]
    except DeltaMixError as error:
        yield Check(what, str(error))


def _content(infos: Mapping[str, TensorInfo], config: DeltaMixConfig) -> Iterator[Check]:
    """Compare the delta's own tensors with their fingerprints."""
    recorded = config.tensor_fingerprints
    if not recorded:
        yield Check("no fingerprints of the delta's own tensors (made by an earlier version)")
        return
    try:
        check_settings(config)
        check_listed(infos.keys(), recorded.keys())
    except DeltaMixError as error:
        yield Check("config.json", str(error))
    wrong = differing_fingerprints(fingerprints(infos), recorded)
    for name in wrong:
        yield Check(name, "it is not what was saved: the file is damaged, or was changed")
    yield Check(f"{len(infos) - len(wrong)} tensors of the delta as they were saved")


def _each(what: str, names: Mapping[str, str], look: Callable[[str, str], int]) -> Iterator[Check]:
    """Look at tensors by their names in model and files: the problems, and how many are sound."""
    sound = 0
    for name, stored in logging.tqdm(names.items(), desc=f"Reading {what.partition(':')[0]}"):
        try:
            sound += look(name, stored)
        except DeltaMixError as error:
            yield Check(name, str(error))
    yield Check(f"{sound} {what}")


def _size(files: list[str], config: DeltaMixConfig, shapes: Mapping[str, tuple[int, int]]) -> Check:
    """Compare the size of all weight files, those too that are not read, with the promised one."""
    try:
        size = size_report(Path(files[0]).parent, shapes)
    except DeltaMixError as error:
        return Check("bytes of weight files", str(error))
    promised = config.budget(size.reference) if size.reference else size.total  # nothing differs
    what = f"{size.total:,} bytes of weight files, {size.ratio:.5f} of bf16"
    if size.total <= promised:
        return Check(what)
    return Check(what, f"config.json promises at most {promised:,}: the files were changed")


def base_checks(
    contents: Contents, base: BaseCheckpoint, measure: Measure = fingerprints
) -> Iterator[Check]:
    """Yield what is wrong with a base that with the delta makes no whole model.

    `measure` gives the fingerprints of the base's tensors. Raises a DeltaMixError if it is another
    base: what else is wrong would say nothing.
    """
    keys, recorded = contents.keys, contents.config.base_fingerprints
    model, where = keys.model, repr(contents.config.base_model)
    kind = type(model).__name__
    base.feed_only({*contents.packed, *contents.config.dropped})
    check_base(recorded, base.infos, where, measure)
    missing = check_filled(keys, contents.overlay, base, recorded, contents.resized)
    for name, source in model.all_tied_weights_keys.items():
        if source in contents.overlay and name in base:  # transformers would keep the base's
            yield Check(
                name,
                f"the base {where} holds {name}, which the model ties to {source}, and the delta "
                "replaces that one alone: remove it from the base",
            )
    # Another class than the saved one may lack its head, or bring one of its own, which
    # transformers initialises and reports. Of the model inside every part must be complete.
    saved = model.config.architectures
    same_class = isinstance(saved, list | tuple) and kind in saved
    filled = {_part_inside(model, name) for name in keys.state.keys() - set(missing)} - {None}
    for name in contents.absent:
        if same_class or _part_inside(model, name) is not None:
            yield Check(
                name,
                f"the delta repo holds {name}, which this {kind} has not: weights and "
                "config.json do not fit",
            )
    for name in missing:
        if same_class or _part_inside(model, name) in filled:
            yield Check(
                name,
                f"neither the delta repo nor the base {where} holds {name!r}: the delta repo "
                "is incomplete",
            )
    made_up = sum(keys.state[name].numel() for name in missing)
    if 2 * made_up > sum(tensor.numel() for tensor in keys.state.values()):
        yield Check(
            "config.json",
            f"most of this {kind} is neither in the delta repo nor in the base {where}: its "
            "config.json is of another model",
        )


def check_filled(
    keys: KeyMap,
    overlay: Collection[str],
    base: BaseCheckpoint,
    recorded: Mapping[str, str],
    resized: Mapping[str, Resized],
) -> list[str]:
    """Check what of the model comes from the base, and list what neither that nor a delta gives.

    The delta replaces the tensors in `overlay`, and `resized` matrices have other rows than the
    base's. Raises a DeltaMixError if a tensor of the base has another shape, or is not `recorded`.
    """
    missing, ties = [], keys.model.all_tied_weights_keys
    for name, tensor in keys.state.items():
        equal = name in ties and (name not in base or ties[name] in base)  # to what it is tied to
        if name in overlay or equal:
            continue
        if name in base:
            rows = resized.get(name.removesuffix(".weight"))
            shape = tuple(tensor.shape) if rows is None else (rows.base, *tensor.shape[1:])
            base.check(name, shape, recorded)
        elif not base.supplies(name):
            missing.append(name)
    return missing


def check_base_was_read(model: PreTrainedModel, base: BaseCheckpoint, names: Iterable[str]) -> None:
    """Raise a DeltaMixError unless the weights `names` of the loaded model are the base's.

    The net under the splice. What was offloaded, sharded or converted is not looked at.
    """
    for name in names:
        tensor = model.get_parameter_or_buffer(name)
        if tensor.device.type == "meta" or tensor_parallel.is_shard(tensor) or not tensor.ndim:
            continue
        plain = base.shape(name) == tuple(tensor.shape)
        if plain and not same(tensor[:1], base.read(name)[:1]):
            raise DeltaMixError(
                f"{name} was not loaded from the base: this transformers version reads "
                "checkpoints in a way deltamix_hf does not know; please report it"
            )


def _part_inside(model: PreTrainedModel, name: str) -> str | None:
    """Find `layers` in `model.layers.0.up_proj`; None for what is no part of the base model."""
    part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return part if part in dict(model.base_model.named_children()) else None
