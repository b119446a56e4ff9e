"""A power cut at a chosen file operation, and what a disk may hold after it.

A disk promises the content of a file as of its last fsync, and the names in a folder as of that
folder's last fsync. Of all that came later anything may be there: each name old or new, each file
torn, empty, of zeros, or whole. That is harsher than a journal, which keeps renames in order.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import Crash

_OPERATIONS = ("replace", "rename", "fsync", "unlink", "remove", "mkdir", "rmdir")
Tree = dict[str, "Tree | bytes"]


class Disk:
    """What the disk below `root` must hold, while files there are changed.

    `cut` is the number of the operation before which the power is cut, None never; `operations`
    counts them. `share` of what is not synced is there after it, None: none, half or all of it.
    Inodes are kept open, so that no number is used twice.
    """

    def __init__(self, root: Path, cut: int | None, seed: int, share: float | None = None):
        self.root, self.cut, self.random = root, cut, random.Random(seed)
        self.share = self.random.choice([0.0, 0.5, 0.5, 1.0]) if share is None else share
        self.operations, self.left, self.last = 0, None, ""
        self.open: dict[int, int] = {}  # inode -> descriptor
        self.data: dict[int, bytes] = {}  # file -> synced content
        self.names: dict[int, dict[str, int]] = {}  # folder -> synced names
        for inode in self._look():
            self._synced(inode)

    def _look(self) -> dict[int, dict[str, int]]:
        """Every inode that has a name now, and the names in it."""
        found: dict[int, dict[str, int]] = {}
        pending = [self.root]
        while pending:
            path = pending.pop()
            inode = path.stat().st_ino
            if inode not in self.open:
                self.open[inode] = os.open(path, os.O_RDONLY)
            found[inode] = {}
            if path.is_dir():
                inside = list(path.iterdir())
                found[inode] = {item.name: item.stat().st_ino for item in inside}
                pending += inside
        return found

    def _content(self, inode: int) -> bytes:
        return os.pread(self.open[inode], 1 << 30, 0)

    def _is_folder(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self.open[inode]).st_mode)

    def _synced(self, inode: int) -> None:
        if self._is_folder(inode):
            self.names[inode] = self._look().get(inode, {})
        elif inode in self.open:
            self.data[inode] = self._content(inode)

    def before(self, name: str, *arguments: object) -> None:
        """Note an operation that follows, or cut the power."""
        self.last = f"{name} {' '.join(str(a) for a in arguments)}"
        now = self._look()
        if self.operations == self.cut:
            self.cut_now(now)
            raise Crash
        self.operations += 1
        if name == "fsync" and (inode := os.fstat(arguments[0]).st_ino) in self.open:
            self._synced(inode)

    def cut_now(self, now: dict[int, dict[str, int]] | None = None) -> None:
        """Choose what the disk holds from now on."""
        self.left = self._choose(self.root.stat().st_ino, now or self._look())

    def _choose(self, inode: int, now: dict[int, dict[str, int]]) -> Tree | bytes:
        if not self._is_folder(inode):
            content = self._content(inode)
            return content if self.data.get(inode) == content else self._torn(inode, content)
        old, new = self.names.get(inode, {}), now.get(inode, {})
        tree: Tree = {}
        for name in sorted(old.keys() | new.keys()):
            later = self.random.random() < self.share
            if (chosen := (new if later else old).get(name)) is not None:
                tree[name] = self._choose(chosen, now)
        return tree

    def _torn(self, inode: int, content: bytes) -> bytes:
        some = self.random.randrange(len(content) + 1)
        zeros = content[:some] + bytes(len(content) - some)
        held = self.data.get(inode, b"")
        return self.random.choice([content, content[:some], zeros, bytes(len(content)), held])

    def restore(self) -> None:
        """Put what was left on the disk there."""
        shutil.rmtree(self.root)
        _write(self.root, self.left)

    def close(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)


def _write(path: Path, tree: Tree | bytes) -> None:
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, below in tree.items():
        _write(path / name, below)


def run_until_cut(
    root: Path,
    job: Callable[[], object],
    cut: int | None,
    seed: int = 0,
    share: float | None = None,
) -> Disk:
    """Run a job that writes below `root`, and cut the power before operation `cut`.

    If the job ends before, the power is cut at once then. `cut` None: it is not cut.
    """
    disk = Disk(root, cut, seed, share)
    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, _watched(disk, name, getattr(os, name)))
        try:
            job()
            disk.last = "the job had ended"
            if cut is not None:
                disk.cut_now()
        except Crash:
            pass
    if disk.left is not None:
        disk.restore()
    disk.close()
    return disk


def _watched(disk: Disk, name: str, operation: Callable[..., object]) -> Callable[..., object]:
    def watched(*arguments: object, **options: object) -> object:
        if disk.left is None:  # else the power is off: what the process does is not seen
            disk.before(name, *arguments)
        return operation(*arguments, **options)

    return watched
