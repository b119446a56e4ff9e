"""Write files and folders whole: a crash, a full disk or a power cut leaves the old or the new.

What is written has a temporary name, is synced to the disk, and is renamed then.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..constants import QUANT_METHOD
from ..errors import DeltaMixError
from .untrusted_paths import CONFIG, INDEX, WEIGHTS, read_object

# What an earlier save of ours may have left that would be read in place of the new files.
_STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_WHOLE = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before this returns."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return  # Windows opens none
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there; then the disk holds their names."""
    path = path.absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def replace(unfinished: Path, path: Path) -> None:
    """Rename a file to `path` once the disk holds it; then the disk holds its name too."""
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Context manager: a hidden folder to write into, which then becomes `target`.

    Files of an earlier save are replaced, others stay. A power cut meanwhile leaves the old files,
    the new ones, or a new config.json whose fingerprints refuse the old weights. Raises a
    DeltaMixError if the folder cannot be written, or the disk is full; nothing is left behind.
    """
    target = target.absolute()
    try:
        with _staging(target) as staging:
            yield staging
            if any(staging.iterdir()):  # only one process of many writes
                _move_into(staging, target)
    except (OSError, SafetensorError) as error:
        raise DeltaMixError(
            f"cannot write to {target}: {error}; make room there, or choose another folder"
        ) from error


def check_output(target: Path, nbytes: int = 0) -> None:
    """Raise a DeltaMixError if a delta of `nbytes` could not be saved as the folder `target`.

    It is tried out: hours of work would be lost. A folder with the weights of a whole model, the
    fine-tune's own or the base's, is none that a delta may replace.
    """
    with written_whole(target) as staging:
        free = shutil.disk_usage(staging).free
    if free < nbytes:
        raise DeltaMixError(
            f"the delta takes up to {nbytes / 1e6:.1f} MB, and where {target} is to be there are "
            f"{free / 1e6:.1f} MB left: make room there, or choose another folder"
        )
    if any((target / name).exists() for name in _WHOLE) and not _is_delta(target):
        raise DeltaMixError(
            f"{target} holds the weights of a whole model, which a delta must not replace: choose "
            "another folder"
        )


def _is_delta(folder: Path) -> bool:
    try:
        config = read_object(os.fspath(folder / CONFIG))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Context manager: a folder from where files can be renamed into `target`.

    It lies beside the target, or inside one that is a mount, or a link to another file system.
    """
    make_folder(target.parent)
    if os.path.lexists(target) and not target.is_dir():
        what = "a file" if target.exists() else "a link that leads nowhere"
        raise NotADirectoryError(f"{target} is {what}")
    places = [target.parent, target] if target.exists() else [target.parent]
    for place in places:
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=place, ignore_cleanup_errors=True
        ) as folder:
            staging = Path(folder)
            if place is places[-1] or _renames(staging, target):
                yield staging
                return


def _renames(staging: Path, target: Path) -> bool:
    """Try whether a file can be renamed from one folder to the other."""
    probe = staging / f".{target.name}.probe"  # one that a crash has left is removed the next time
    probe.touch()
    try:
        os.replace(probe, target / probe.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    (target / probe.name).unlink(missing_ok=True)  # by another process that tries, too
    return True


def _move_into(staging: Path, target: Path) -> None:
    """Rename what was written to `target`, replacing the files of an earlier save."""
    written = {path.relative_to(staging): path for path in staging.rglob("*") if path.is_file()}
    for path in written.values():
        path.chmod(0o644)  # safetensors writes for its owner alone
        sync(path)
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        sync(folder)
    if not target.exists():
        staging.chmod(0o755)  # mkdtemp makes it private
        os.replace(staging, target)
        sync(target.parent)
        return
    for name in written:  # all, before a file is replaced
        make_folder((target / name).parent)
    for step in _in_order(written):
        for name in step:
            os.replace(written[name], target / name)
        for folder in {(target / name).parent for name in step}:
            sync(folder)
    names = {name.name for name in written if len(name.parts) == 1}
    if any(_STALE.fullmatch(name) for name in names):  # not an adapter, beside the delta
        for old in target.iterdir():
            if _STALE.fullmatch(old.name) and old.name not in names:
                old.unlink()
        sync(target)


def _in_order(names: Iterable[Path]) -> list[list[Path]]:
    """Sort files into those that the disk must hold before the next are replaced.

    A new config.json refuses old weights. So new weights come last: where they are whole, so is
    all else, and no old tokenizer is read with them.
    """
    steps: list[list[Path]] = [[], [], []]
    for name in sorted(names):
        weights = len(name.parts) == 1 and _STALE.fullmatch(name.name)
        steps[0 if str(name) == CONFIG else 2 if weights else 1].append(name)
    return steps
