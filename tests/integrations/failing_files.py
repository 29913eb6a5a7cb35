"""File operations of which one fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from quantize_bench import Quick

from diskoffload.errors import NoSpaceError, StorageError


class Failing(Quick):
    """Refuses one step, and forgets what was not synced where it refuses to sync."""

    def __init__(self, fail_at: int, code: int, of: str = "") -> None:
        self.left, self.code, self.of = fail_at, code, of
        self.synced: dict[int, bytes] = {}

    def step(self, name: str, path: Path) -> None:
        self.left -= f"{name} {path.name}".startswith(self.of)
        if self.left == 0:
            self.left = -1
            kind = NoSpaceError if self.code == errno.ENOSPC else StorageError
            raise kind(self.code, "as the test wishes", str(path))

    def sync(self, fd: int, path: Path) -> None:
        inode = os.fstat(fd).st_ino
        try:
            self.step("sync", path)
        except StorageError:
            lost = self.synced.get(inode, b"").ljust(os.fstat(fd).st_size, b"\0")
            with path.open("r+b") as file:
                file.write(lost)
            raise
        super().sync(fd, path)
        self.synced[inode] = path.read_bytes()


def _failing(name: str) -> Any:
    plain = getattr(Quick, name)

    def method(self: Failing, *arguments: Any) -> Any:
        paths = [one for one in arguments if isinstance(one, Path)]
        self.step(name, paths[-1])
        return plain(self, *arguments)

    return method


for _name in ("create", "set_size", "write", "sync_folder", "rename"):
    setattr(Failing, _name, _failing(_name))
