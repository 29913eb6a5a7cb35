"""The disks that a power cut can leave: what was not synced is lost, or torn.

Every step that changes a file is recorded. From the record come the disks that a power cut
after it could leave: names, data or both only as they were synced last, or data torn.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize_bench import Quick

Tree = dict[str, bytes | None]  # a path's content; None for a folder
Names = dict[int, dict[str, int]]  # by a folder's inode
Data = dict[int, bytes]
_PAGE_BYTES = 4096


class Recorder(Quick):
    """Does what it is told, and collects what would be on the disk after a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.synced_names: Names = {}
        self.synced_data: Data = {}
        self.latest: Data = {}  # of every file that there ever was
        self.disks: dict[str, Tree] = {}
        self.chance = random.Random(1)
        self.held: list[int] = []  # keeps inodes from being used again

    def close_all(self) -> None:
        for fd in self.held:
            os.close(fd)

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.held.append(os.dup(fd))
        return fd

    def sync(self, fd: int, path: Path) -> None:
        super().sync(fd, path)
        self.synced_data[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        names = {one.name: one.inode() for one in os.scandir(path)}
        self.synced_names[path.stat().st_ino] = names

    def look(self) -> None:
        """Add the disks that there could be now."""
        names: Names = {}
        for folder, _, _ in os.walk(self.root):
            entries = list(os.scandir(folder))
            names[os.stat(folder).st_ino] = {one.name: one.inode() for one in entries}
            for one in entries:
                if one.is_file():
                    self.latest[one.inode()] = Path(one.path).read_bytes()
        torn = {inode: self._torn(inode) for inode in self.latest}
        folders = names.keys() | self.synced_names.keys()
        for some_names in (names, self.synced_names):
            for some_data in (self.latest, self.synced_data, torn):
                tree: Tree = {}
                self._plant(tree, "", self.root.stat().st_ino, folders, some_names, some_data)
                self.disks[_digest(tree)] = tree

    def _plant(
        self, tree: Tree, path: str, folder: int, folders: set[int], names: Names, data: Data
    ) -> None:
        for name, inode in names.get(folder, {}).items():
            if inode in folders:
                tree[path + name] = None
                self._plant(tree, f"{path}{name}/", inode, folders, names, data)
            else:
                tree[path + name] = data.get(inode, b"")

    def _torn(self, inode: int) -> bytes:
        """Mix what was synced and what was written since, page by page."""
        new = self.latest[inode]
        old = self.synced_data.get(inode, b"").ljust(len(new), b"\0")
        starts = range(0, len(new), _PAGE_BYTES)
        pages = [self.chance.choice((old, new))[one : one + _PAGE_BYTES] for one in starts]
        return b"".join(pages)[: len(new)]


def _recorded(name: str) -> Any:
    plain = getattr(Recorder, name)

    def method(self: Recorder, *arguments: Any) -> Any:
        found = plain(self, *arguments)
        self.look()
        return found

    return method


for _name in (
    *("create", "set_size", "write", "sync", "sync_folder", "rename"),
    *("remove", "make_folder", "remove_folder_if_empty", "lock"),
):
    setattr(Recorder, _name, _recorded(_name))


def _digest(tree: Mapping[str, bytes | None]) -> str:
    digest = hashlib.sha256()
    for path in sorted(tree):
        content = tree[path]
        digest.update(f"{path}\0{None if content is None else len(content)}\0".encode())
        digest.update(content or b"")
    return digest.hexdigest()


def make(tree: Tree, root: Path) -> None:
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
