"""File operations that are watched: recorded, or ended by a kill or a fault at any one of them."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

import diskoffload.store.folder
import diskoffload.store.journal
import diskoffload.store.partial_file
from diskoffload.system.files import BLOCK_BYTES, Files, naming_faults
from diskoffload.system.memory import Memory

_Result = TypeVar("_Result")


@contextmanager
def using(files: Files) -> Iterator[None]:
    """Have every folder that is opened meanwhile do its file operations through this object.

    Its journal is compacted often: as soon as it is twice as long as what is alive. Tensors of
    a few blocks go past the page cache, as large ones do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diskoffload.store.folder, "Files", lambda: files)
        patch.setattr(diskoffload.store.journal, "_LEAST_DEAD_BYTES", 0)
        patch.setattr(diskoffload.store.partial_file, "_DIRECT_FROM_BYTES", 0)
        patch.setattr(diskoffload.store.partial_file, "_LEAST_DIRECT_BYTES", BLOCK_BYTES)
        yield


class Watched(Files):
    """Passes every operation through one method; waits for no disk. Thread-safe."""

    def watch(
        self,
        what: str,
        path: Path,
        whole: Callable[[], _Result],
        part: Callable[[], object] | None = None,
    ) -> _Result:
        """Do an operation.

        Args:
            what: its name.
            path: the file or folder that it is done to.
            whole: does it.
            part: does a part of it, where that can be.
        """
        return whole()

    def open_for_reading(self, path: Path) -> int:
        return self.watch("open", path, lambda: super(Watched, self).open_for_reading(path))

    def open_for_writing(self, path: Path) -> int:
        return self.watch("open", path, lambda: super(Watched, self).open_for_writing(path))

    def open_for_writing_past_cache(self, path: Path) -> int | None:
        whole = super().open_for_writing_past_cache
        return self.watch("open", path, lambda: whole(path))

    def duplicate(self, fd: int, path: Path) -> int:
        return self.watch("open", path, lambda: super(Watched, self).duplicate(fd, path))

    def close(self, fd: int) -> None:
        whole = super().close
        # However it ends, the descriptor is closed.
        self.watch("close", Path(f"descriptor {fd}"), lambda: whole(fd), lambda: whole(fd))

    def map(self, fd: int, nbytes: int, path: Path) -> Memory:
        return self.watch("map", path, lambda: super(Watched, self).map(fd, nbytes, path))

    def read_into(self, fd: int, target: memoryview, offset: int, path: Path) -> None:
        whole = super().read_into
        self.watch("read", path, lambda: whole(fd, target, offset, path))

    def create(self, path: Path) -> int:
        return self.watch("create", path, lambda: super(Watched, self).create(path))

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        whole = super().write
        # Half of its blocks, if it has some: other ends a direct write cannot have.
        half = data[: len(data) // 2 // BLOCK_BYTES * BLOCK_BYTES or len(data) // 2]
        self.watch(
            "write",
            path,
            lambda: whole(fd, data, offset, path),
            lambda: whole(fd, half, offset, path),
        )

    def set_size(self, fd: int, nbytes: int, path: Path) -> None:
        whole = super().set_size
        self.watch("set_size", path, lambda: whole(fd, nbytes, path))

    def sync(self, fd: int, path: Path) -> None:
        self.watch("sync", path, lambda: None)

    def sync_folder(self, path: Path) -> None:
        self.watch("sync_folder", path, lambda: None)

    def rename(self, source: Path, target: Path) -> None:
        whole = super().rename
        self.watch("rename", target, lambda: whole(source, target))

    def exchange(self, first: Path, second: Path) -> bool:
        return self.watch("exchange", first, lambda: super(Watched, self).exchange(first, second))

    def remove(self, path: Path) -> None:
        whole = super().remove
        self.watch("remove", path, lambda: whole(path))

    def make_folder(self, path: Path) -> tuple[Path, ...]:
        return self.watch("make_folder", path, lambda: super(Watched, self).make_folder(path))

    def lock(self, path: Path) -> int:
        return self.watch("lock", path, lambda: super(Watched, self).lock(path))


READS = frozenset({"open", "close", "map", "read"})


class Killing(Watched):
    """Kills the process at one of its operations: before, in the middle of or after it."""

    def __init__(self, at: int, when: str) -> None:
        """Count from 0; a negative number never kills.

        Args:
            at: which operation, of those that change anything.
            when: ``"before"``, ``"amid"`` or ``"after"``.
        """
        super().__init__()
        self.count = 0
        self._at, self._when = at, when
        self._lock = threading.Lock()

    def watch(
        self,
        what: str,
        path: Path,
        whole: Callable[[], _Result],
        part: Callable[[], object] | None = None,
    ) -> _Result:
        if what in READS:
            return whole()
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self._at and self._when != "after":
            if self._when == "amid" and part is not None:
                part()
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole()
        if number == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class Failing(Watched):
    """Fails one operation, or all from one on until it is healed.

    Attributes:
        watched: every operation there was, and the name of what it was done to.
        failed: those that failed.
        lasts: whether all fail from one on.
    """

    def __init__(self, at: int, code: int = errno.EIO, *, lasts: bool = False) -> None:
        """Count from 0; a negative number never fails."""
        super().__init__()
        self.watched: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self._at, self._code, self.lasts = at, code, lasts
        self._lock = threading.Lock()

    def heal(self) -> None:
        """Have no more fail."""
        self._at, self.lasts = -1, False

    def watch(
        self,
        what: str,
        path: Path,
        whole: Callable[[], _Result],
        part: Callable[[], object] | None = None,
    ) -> _Result:
        with self._lock:
            number = len(self.watched)
            self.watched.append((what, path.name))
        fails = 0 <= self._at <= number if self.lasts else number == self._at
        if not fails or (self._code == errno.ENOSPC and what in {*READS, "remove"}):
            return whole()
        self.failed.append((what, path.name))
        if part is not None:
            part()
        with naming_faults(f"{what} (a fault made by the test)", path):
            raise OSError(self._code, os.strerror(self._code))


# ---------------------------------------------------------------------- a record


@dataclass(frozen=True)
class Op:
    """One operation that was done, or one that failed.

    Attributes:
        kind: what was done; ``"mark"`` for a word between operations.
        path: to which file or folder; of a mark, its text.
        file: the number of the file, whatever its name is.
        target: the new name.
        offset: of a write; of ``"set_size"``, the size.
        data: what was written.
    """

    kind: str
    path: str
    file: int = 0
    target: str = ""
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


class Recording(Failing):
    """Records what is done in one folder and beneath, in the order in which it is done.

    Attributes:
        ops: the record.
        before: what was there before, by path; it counts as durable.
    """

    def __init__(self, root: Path, at: int = -1, code: int = errno.EIO) -> None:
        super().__init__(at, code)
        self.root = root
        self.ops: list[Op] = []
        self.before = {
            str(path): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
        }
        self._in_order = threading.RLock()
        self._numbers = len(self.before)
        self._file_at = {path: n for n, path in enumerate(self.before, start=1)}
        self._file_of_fd: dict[int, int] = {}

    def numbered(self) -> dict[str, int]:
        """Give the number of each file that was there before."""
        return {path: n for n, path in enumerate(self.before, start=1)}

    def mark(self, text: str) -> None:
        """Note where in the record something else happened."""
        with self._in_order:
            self.ops.append(Op("mark", text))

    def watch(
        self,
        what: str,
        path: Path,
        whole: Callable[[], _Result],
        part: Callable[[], object] | None = None,
    ) -> _Result:
        with self._in_order:
            try:
                return super().watch(what, path, whole, part)
            except BaseException:
                if what == "sync":
                    self.ops.append(Op("failed_sync", str(path), self._file_at.get(str(path), 0)))
                raise

    def _note(self, kind: str, path: Path, file: int, **more: object) -> None:
        self.ops.append(Op(kind, str(path), file, **more))  # type: ignore[arg-type]

    def open_for_reading(self, path: Path) -> int:
        with self._in_order:
            fd = super().open_for_reading(path)
            self._file_of_fd[fd] = self._file_at.get(str(path), 0)
            return fd

    def open_for_writing(self, path: Path) -> int:
        with self._in_order:
            fd = super().open_for_writing(path)
            self._file_of_fd[fd] = self._file_at[str(path)]
            return fd

    def open_for_writing_past_cache(self, path: Path) -> int | None:
        with self._in_order:
            fd = super().open_for_writing_past_cache(path)
            if fd is not None:
                self._file_of_fd[fd] = self._file_at[str(path)]
            return fd

    def create(self, path: Path) -> int:
        with self._in_order:
            fd = super().create(path)
            self._created(fd, path)
            return fd

    def _created(self, fd: int, path: Path) -> None:
        self._numbers += 1
        self._file_of_fd[fd] = self._file_at[str(path)] = self._numbers
        self._note("create", path, self._numbers)

    def lock(self, path: Path) -> int:
        with self._in_order:
            fd = super().lock(path)
            if str(path) not in self._file_at:
                self._created(fd, path)
            return fd

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        with self._in_order:
            written = bytes(data)
            try:
                super().write(fd, data, offset, path)
            except BaseException:
                written = written[: len(written) // 2]
                raise
            finally:
                self._note("write", path, self._file_of_fd[fd], offset=offset, data=written)

    def set_size(self, fd: int, nbytes: int, path: Path) -> None:
        with self._in_order:
            super().set_size(fd, nbytes, path)
            self._note("set_size", path, self._file_of_fd[fd], offset=nbytes)

    def sync(self, fd: int, path: Path) -> None:
        with self._in_order:
            super().sync(fd, path)
            self._note("sync", path, self._file_of_fd[fd])

    def sync_folder(self, path: Path) -> None:
        with self._in_order:
            super().sync_folder(path)
            self._note("sync_folder", path, 0)

    def rename(self, source: Path, target: Path) -> None:
        with self._in_order:
            super().rename(source, target)
            file = self._file_at[str(target)] = self._file_at.pop(str(source))
            self._note("rename", source, file, target=str(target))

    def exchange(self, first: Path, second: Path) -> bool:
        with self._in_order:
            done = super().exchange(first, second)
            if done:
                files = self._file_at
                one, two = str(first), str(second)
                files[one], files[two] = files[two], files[one]
                self._note("exchange", first, 0, target=two)
            return done

    def remove(self, path: Path) -> None:
        with self._in_order:
            super().remove(path)
            if str(path) in self._file_at:
                self._note("remove", path, self._file_at.pop(str(path)))

    def make_folder(self, path: Path) -> tuple[Path, ...]:
        with self._in_order:
            new = [one for one in (path, *path.parents) if not one.exists()]
            for one in reversed(new):
                self._numbers += 1
                self._file_at[str(one)] = self._numbers
                self._note("make_folder", one, self._numbers)
            return super().make_folder(path)

    def remove_folder_if_empty(self, path: Path) -> None:
        with self._in_order:
            super().remove_folder_if_empty(path)
            if not path.exists() and str(path) in self._file_at:
                self._note("remove", path, self._file_at.pop(str(path)))
