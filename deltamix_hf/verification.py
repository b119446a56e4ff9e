"""Is a delta repo sound, and is its base the right one? All that is wrong, not just the first.

Loading makes the same checks and stops at the first that fails; nothing of the model is built here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from .architecture import empty_model
from .base import KeyMap, resolve_base
from .config import DeltaMixConfig
from .delta_repo import Contents, check_finite, checked_experts, contents_of, find_delta
from .errors import DeltaMixError
from .format import PREFIX, TensorInfo, check_base, fingerprint, read_headers, size_report
from .inspection import stored_shapes
from .packed import PackedFactors, parts
from .trust import check_base_name

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

        yield from _matrices(contents, config, shapes, keys, read)
        yield from _overlay(contents, read)
    yield _budget(files, config, shapes)
    yield _base(repo, config, base, quick)


def _matrices(
    contents: Contents,
    config: DeltaMixConfig,
    shapes: Mapping[str, tuple[int, int]],
    keys: KeyMap,
    read: Read,
) -> Iterator[Check]:
    kinds, sound = parts(config.codebook == "gaussian"), 0
    bar = logging.tqdm(contents.packed.items(), desc="Reading matrices", unit="matrix")
    for name, stored in bar:
        try:
            tensors = {part: read(f"{stored}.{PREFIX}{part}") for part in kinds}
            PackedFactors.checked(*shapes[name], config.group_size, tensors)
            sound += 1
        except DeltaMixError as error:
            yield Check(name, str(error))
    for name, stored in contents.experts.items():
        try:
            packed = checked_experts(keys, name, stored, config, read)
            sound += int((packed.counts > 0).sum())
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
