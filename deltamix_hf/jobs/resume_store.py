"""What an interrupted compression had finished, so that the next one goes on from there.

A folder with one safetensors file for each finished part: the calibration tokens, the widths of all
ranks, every compressed matrix, the state of the tuning. A part is written under a temporary name,
synced and renamed, so a file is whole or absent whenever the process is killed or the power cut.
File names begin with the job's identity, a hash of all that its result depends on (weights of both
models, options, calibration data, versions): parts of another job are never read, and everything
measured anew in between is measured as before, so the bytes are those of a run that was not
interrupted. (On a CPU; a GPU may add up in another order and differ in the last digit.)

A part holds the SHA-256 of its content. A job that goes on compares them first (1 to 2 s a GB), and
does again what a disk has damaged.

Without a folder nothing is kept. `save_pretrained` removes the parts when the delta is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..errors import DeltaMixError
from ..storage.durable import make_folder, replace, sync

logger = logging.get_logger(__name__)

SUFFIX = ".part.safetensors"
# Parts that are done again one by one. All others (hidden states, gradients, sums) follow from each
# other, and many were dropped since: without one of them the rest is of no use.
_ALONE = ("calibration", "spectrum of ", "allocation", "matrix ", "tuning")


class ResumeStore:
    """Finished parts of one job, by name, in a folder (None keeps none).

    `identity` is of the job, from `job_identity`. Raises DeltaMixError if the folder cannot be
    made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, identity: str = ""):
        self.folder = None if folder is None else Path(folder)
        self.identity, self.worker = identity, 0
        try:
            if self.folder is not None:
                make_folder(self.folder)
        except OSError as error:
            raise DeltaMixError(
                f"cannot keep finished parts in {folder}: {error}; give another checkpoint_dir"
            ) from error

    def _path(self, name: str) -> Path | None:
        safe = hashlib.sha256(name.encode()).hexdigest()[:24]
        kind = "one" if name.startswith(_ALONE) else f"run{self.worker}"
        return self.folder and self.folder / f"{self.identity[:24]}-{kind}-{safe}{SUFFIX}"

    def _files(self) -> Iterable[Path]:
        """Every file of this job, of all workers: parts, and what was not finished."""
        return () if self.folder is None else self.folder.glob(f"{self.identity[:24]}-*-*")

    def drop_damaged(self) -> None:
        """Compare all parts with their hashes; drop those that differ, and what follows from them.

        And all parts if an earlier `remove` was interrupted. For one process, before others look
        for parts. A warning names what was damaged.
        """
        if self.folder is None:
            return
        if self._removing(self.folder).exists():
            self._remove_parts(self.folder)
        found = [path for path in self._files() if path.name.endswith(SUFFIX)]
        shown = logging.tqdm(found, desc="Checking finished parts", unit="part")
        damaged = [path for path in shown if not _is_sound(path)] if found else []
        if not damaged:
            return
        logger.warning("%s is damaged: what is missing now is done again", damaged[0])
        if any("-run" in path.name for path in damaged):
            follow = [path for path in found if "-run" in path.name and path not in damaged]
            _unlink(self.folder, follow)  # first: while a damaged one is there, the rest is dropped
        _unlink(self.folder, damaged)

    def __contains__(self, name: str) -> bool:
        return (path := self._path(name)) is not None and path.is_file()

    def read(self, name: str, mapped: bool = False) -> tuple[dict[str, Tensor], Any] | None:
        """Read tensors and facts of a finished part; None if there is none that can be read.

        `mapped` tensors lie in the file, and come into memory where they are looked at.
        """
        if (path := self._path(name)) is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                if not mapped:
                    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
                return tensors, json.loads(handle.metadata()["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            path.unlink(missing_ok=True)  # a power cut can leave a torn file: do that part again
            return None

    def load(self, name: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Any]:
        """Read a part that this job has written, onto a device; DeltaMixError if it is gone."""
        if (found := self.read(name)) is None:
            raise DeltaMixError(
                f"{self.folder} was changed while it was in use: delete it and start again"
            )
        return {key: tensor.to(device) for key, tensor in found[0].items()}, found[1]

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
        """Keep a finished part: tensors, and facts that JSON can hold.

        Raises DeltaMixError if the disk is full, or the folder has gone.
        """
        if (path := self._path(name)) is None:
            return
        # An unfinished file cannot be taken for a part: it has another suffix.
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            said = json.dumps(facts)
            save_file(kept, unfinished, {"facts": said, "sha256": job_identity(said, kept)})
            replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise DeltaMixError(
                f"cannot keep finished parts in {self.folder}: {error}; make room there"
            ) from error

    def of(self, worker: int) -> ResumeStore:
        """Open a store in the same folder for what no other worker is to see."""
        store = ResumeStore(self.folder, self.identity)
        store.worker = worker
        return store

    def forget(self, name: str) -> None:
        """Drop a part, if it is there."""
        if (path := self._path(name)) is not None:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget all parts of this job, and remove the folder if nothing else is in it."""
        if self.folder is None:
            return
        with suppress(OSError):  # somebody else's files, or gone already
            self._remove_parts(self.folder)
            self.folder.rmdir()

    def _removing(self, folder: Path) -> Path:
        """The file that is there while parts are removed: some without others lead nowhere."""
        return folder / f"{self.identity[:24]}-removing"

    def _remove_parts(self, folder: Path) -> None:
        removing = self._removing(folder)
        removing.touch()
        sync(folder)
        _unlink(folder, self._files())
        removing.unlink(missing_ok=True)


def _unlink(folder: Path, paths: Iterable[Path]) -> None:
    """Unlink files; the disk holds none of them when this returns."""
    for path in paths:
        path.unlink(missing_ok=True)
    sync(folder)


def _is_sound(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as handle:
            said = handle.metadata()
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return said["sha256"] == job_identity(said["facts"], tensors)
    except (SafetensorError, OSError, KeyError, TypeError):
        return False


class TensorList:
    """A list of tensors on disk, in the order they came; they are read as copies.

    What an earlier run has put there is there again; `clear` it to begin anew.
    """

    def __init__(self, store: ResumeStore, name: str, device: torch.device | str = "cpu"):
        self.store, self.name, self.device = store, name, device
        self._length = 0
        while self._key(self._length) in store:
            self._length += 1

    def _key(self, index: int) -> str:
        return f"{self.name} {index}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return self.store.load(self._key(range(self._length)[index]), self.device)[0]["item"]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.store.write(self._key(range(self._length)[index]), {"item": value})

    def append(self, value: Tensor) -> None:
        """Write a tensor to the end."""
        self.store.write(self._key(self._length), {"item": value})
        self._length += 1

    def clear(self) -> None:
        """Forget all tensors."""
        while self._length:
            self._length -= 1
            self.store.forget(self._key(self._length))


def job_identity(facts: Any, tensors: Mapping[str, Tensor]) -> str:
    """Hash facts that JSON can hold and named tensors (dtypes, shapes, values) by SHA-256."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        for piece in flat.split(1 << 20):  # no second copy of a large matrix
            digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
