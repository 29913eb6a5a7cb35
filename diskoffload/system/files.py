"""Files as the operating system gives them, behind one thin object.

The store never calls ``os`` for a file itself. It calls a :class:`Files`, so that a test
can hand it one that records, drops or reorders what is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diskoffload.errors import NoSpaceError, StorageError
from diskoffload.system.locking import check_unlocked, lock_file, unlock
from diskoffload.system.memory import Memory, map_again, map_file
from diskoffload.system.portable import IS_LINUX, of_linux, proc

# What devices of today read at once at the least, or a multiple of it.
BLOCK_BYTES = 4096
# The kernel's usual read-ahead: of a larger request it drops the rest (mm/readahead.c).
_FETCH_STEP_BYTES = 128 << 10
# macOS refuses 2 GiB at once where Linux takes a part (read(2), write(2)).
_CALL_STEP_BYTES = 1 << 30
# macOS alone has it; these are what file systems without it answer (fcntl(2) there).
_FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)
_CANNOT_FULL_SYNC = {errno.ENOTSUP, errno.ENOTTY, errno.EINVAL, errno.ENODEV}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# How /proc/self/mountinfo writes spaces and the like (proc_pid_mountinfo(5)).
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}
_PERMISSION = "give this user the right to do so, or name a folder that it may write to"
_DESCRIPTORS = "close files, or raise the limit (ulimit -n), and try again"
# What to do about a refusal, where its own words do not say.
_ADVICE = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "the quota is used up: free some space there and try again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name a folder on a file "
    "system that takes larger ones",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "mount it for writing, or name a folder that can be written to",
    errno.ELOOP: "a symbolic link is not followed here: remove it, or name another folder",
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: _DESCRIPTORS,
    errno.EIO: "the device failed: see the system's log, and do not trust it before it is mended",
    errno.ESTALE: "the server no longer knows the file: open the folder again",
}

Identity = tuple[int, int, int, int]
"""Device, inode, length in bytes and time of the last change in ns: which file, as it was."""


@contextmanager
def naming_faults(action: str, path: Path | str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one of ours, naming what was tried and where."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        code = error.errno or 0
        reason = error.strerror or str(error)
        text = f"could not {action}: {reason}"
        text += f"; {_ADVICE[code]}" if code in _ADVICE else ""
        kind = NoSpaceError if code in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(code, text, str(path)) from error


class Files:
    """The file operations that the store needs; stateless and thread-safe.

    Every method raises :class:`~diskoffload.errors.StorageError` where the system refuses,
    with the file's name and the system's own error number.

    Attributes:
        may_map: whether files are mapped; else they are read, as where the system refuses.
        may_read_past_cache: whether files may be read directly into a process's memory.
        may_write_past_cache: whether they may be written directly from it.
    """

    may_map = True
    may_read_past_cache = True
    may_write_past_cache = True

    def __init__(
        self,
        *,
        may_map: bool = True,
        may_read_past_cache: bool = True,
        may_write_past_cache: bool = True,
    ) -> None:
        self.may_map = may_map
        self.may_read_past_cache = may_read_past_cache
        self.may_write_past_cache = may_write_past_cache

    def open_for_reading(self, path: Path) -> int:
        """Open an existing regular file; the caller closes the descriptor."""
        with naming_faults("open the file", path):
            # A pipe would otherwise be waited for.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise StorageError(
                        errno.EINVAL, "could not open the file: it is no regular file", str(path)
                    )
            except BaseException:
                os.close(fd)
                raise
            return fd

    def open_past_cache(self, path: Path, fd: int = -1) -> int | None:
        """Open an existing file so that reading it leaves nothing in the page cache.

        Reads must begin at multiples of :data:`BLOCK_BYTES`, in the file and in memory.

        Args:
            path: the file.
            fd: an open descriptor of it, if its name may be gone.

        Returns:
            A descriptor, which the caller closes; ``None`` where the system or the file system
            cannot (``open(2)``, ``O_DIRECT``).
        """
        if not self.may_read_past_cache:
            return None
        try:
            place = path if fd < 0 else Path(proc(f"self/fd/{fd}"))
            return _open_direct(place, os.O_RDONLY)
        except OSError as error:
            if fd >= 0 and error.errno == errno.ENOENT:  # no /proc here
                return None
            with naming_faults("open the file", path):
                raise

    def open_for_writing_past_cache(self, path: Path) -> int | None:
        """Open an existing file so that what is written to it is not left in the page cache.

        Writes must begin and end at multiples of :data:`BLOCK_BYTES`, in the file and in memory.

        Returns:
            A descriptor, which the caller closes; ``None`` where the system or the file system
            cannot.
        """
        if not self.may_write_past_cache:
            return None
        with naming_faults("open the file for writing", path):
            return _open_direct(path, os.O_WRONLY)

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet, with the user's umask."""
        with naming_faults("create the file", path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_for_writing(self, path: Path) -> int:
        """Open an existing file for reading and writing."""
        with naming_faults("open the file for writing", path):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """Open an existing regular file for reading, for the length of a ``with`` block."""
        fd = self.open_for_reading(path)
        try:
            yield fd
        finally:
            self.close(fd)

    @contextmanager
    def writing(self, path: Path, *, new: bool = False) -> Iterator[int]:
        """Open a file for writing, existing or :meth:`create`-d, for the length of a block."""
        fd = self.create(path) if new else self.open_for_writing(path)
        try:
            yield fd
        finally:
            self.close(fd)

    def duplicate(self, fd: int, path: Path) -> int:
        """Give another descriptor of an open file, even if its name is gone."""
        with naming_faults("open once more the file", path):
            return os.dup(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor, and free what it locks; it is closed whatever is raised."""
        unlock(fd)
        with naming_faults("close the file", f"descriptor {fd}"):
            os.close(fd)

    def map(self, fd: int, nbytes: int, path: Path) -> Memory:
        """Map the first bytes of a file privately, see :func:`map_file`."""
        if not self.may_map:
            raise StorageError(errno.ENODEV, "files are not to be mapped", str(path))
        return map_file(fd, nbytes, str(path))

    def map_again(self, memory: Memory, fd: int, address: int, nbytes: int, path: Path) -> None:
        """Map a part of a file anew, see :func:`map_again`."""
        with naming_faults("map anew the file", path):
            map_again(memory, fd, address, nbytes)

    def identity(self, fd: int, path: Path) -> Identity:
        """Tell which file is open and how it is now."""
        with naming_faults("look at the file", path):
            return _identity(os.fstat(fd))

    def identity_at(self, path: Path) -> Identity | None:
        """Tell which file has that name and how it is now; ``None`` if there is none."""
        with naming_faults("look at the file", path):
            try:
                return _identity(os.stat(path))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def check_space(self, path: Path, nbytes: int) -> None:
        """Refuse what cannot fit on the file system that holds ``path`` or will hold it.

        Raises:
            NoSpaceError: fewer bytes are free there.
        """
        free = free_bytes(path)
        if nbytes > free:
            raise NoSpaceError(
                errno.ENOSPC,
                f"cannot write {nbytes} bytes: {free} are free there, {nbytes - free} are "
                "missing; free some space there and try again",
                str(path),
            )

    def size_bytes(self, fd: int, path: Path) -> int:
        """Tell an open file's length."""
        with naming_faults("ask for the size of the file", path):
            return os.fstat(fd).st_size

    def read_into(self, fd: int, target: memoryview, offset: int, path: Path) -> None:
        """Fill ``target`` from ``offset`` on; a file that ends before is an error."""
        done = 0
        with naming_faults("read the file", path):
            while done < len(target):
                step = target[done : done + _CALL_STEP_BYTES]
                count = os.preadv(fd, [step], offset + done)
                if count == 0:
                    raise StorageError(
                        errno.EIO,
                        f"could not read {len(target)} bytes at offset {offset}: the file "
                        f"ends after {done} of them; it was truncated since it was opened",
                        str(path),
                    )
                done += count

    def read_blocks(
        self, fd: int, target: memoryview, offset: int, needed_bytes: int, path: Path
    ) -> None:
        """Fill ``target``, whole blocks, from ``offset`` on; the file may end in the last one.

        Args:
            fd: of :meth:`open_past_cache`.
            target: memory at a block's beginning.
            offset: a multiple of the block.
            needed_bytes: a file that ends before so many is an error.
            path: for messages.
        """
        done = 0
        with naming_faults("read the file", path):
            while done < needed_bytes:
                count = os.preadv(fd, [target[done:]], offset + done)
                done += count
                if count == 0 or (count % BLOCK_BYTES and done < needed_bytes):
                    raise StorageError(
                        errno.EIO,
                        f"could not read {needed_bytes} bytes at offset {offset}: the file ends "
                        f"after {done} of them; it was truncated since it was opened",
                        str(path),
                    )

    def fetch_into_cache(self, fd: int, offset: int, nbytes: int) -> None:
        """Have the kernel begin to read those bytes that its page cache lacks; a hint.

        Of what is there already each GiB costs some 20 ms.
        """
        advise = of_linux(os, "posix_fadvise")
        if advise is None:
            return
        with contextlib.suppress(OSError):
            for start in range(offset, offset + nbytes, _FETCH_STEP_BYTES):
                step_bytes = min(_FETCH_STEP_BYTES, offset + nbytes - start)
                advise(fd, start, step_bytes, os.POSIX_FADV_WILLNEED)

    def tells_what_is_cached(self, fd: int, path: Path) -> bool:
        """Whether this process is told which pages of a file are in the page cache.

        The kernel answers to who owns the file or may do anything, and says yes to all others
        whatever is the case (``can_do_mincore`` in mm/mincore.c).
        """
        with naming_faults("look at the file", path):
            return os.geteuid() in (0, os.fstat(fd).st_uid)

    def drop_from_cache(self, fd: int, offset: int, nbytes: int) -> None:
        """Tell the kernel that these bytes of a file are of no more use; a hint, no promise."""
        advise = of_linux(os, "posix_fadvise")
        if advise is not None:
            with contextlib.suppress(OSError):
                advise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def read(self, path: Path) -> bytes:
        """Read all of a small file."""
        with self.reading(path) as fd:
            found = bytearray(self.size_bytes(fd, path))
            self.read_into(fd, memoryview(found), 0, path)
        return bytes(found)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        """Write all of ``data`` at ``offset``."""
        done = 0
        with naming_faults("write the file", path):
            while done < len(data):
                done += os.pwrite(fd, data[done : done + _CALL_STEP_BYTES], offset + done)

    def set_size(self, fd: int, nbytes: int, path: Path) -> None:
        """Give a file its final length; what is not written later reads as zeros."""
        with naming_faults("set the size of the file", path):
            os.ftruncate(fd, nbytes)

    def sync(self, fd: int, path: Path) -> None:
        """Wait until a file's bytes are on the device."""
        with naming_faults("sync the file", path):
            _sync(fd)

    def sync_folder(self, path: Path) -> None:
        """Wait until a folder's entries are on the device."""
        with naming_faults("sync the folder", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _sync(fd)
            finally:
                os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system; an existing target file is replaced."""
        with naming_faults(f"rename {source.name} to {target.name}", target):
            os.rename(source, target)

    def exchange(self, first: Path, second: Path) -> bool:
        """Swap two names at one stroke; tell whether the system could."""
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = getattr(libc, "renameat2", None) if IS_LINUX else None
        if renameat2 is None:
            return False
        arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
        return bool(renameat2(*arguments, ctypes.c_uint(_RENAME_EXCHANGE)) == 0)

    def remove(self, path: Path) -> None:
        """Remove one file; one that is gone already is fine."""
        with naming_faults("remove the file", path):
            path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> tuple[Path, ...]:
        """Make a folder and its parents; give those that were not there before, innermost first.

        Parents that were made are durable afterwards, the folder's own name is not. If it
        cannot be made, none of them is left.
        """
        with naming_faults("make the folder", path):
            made = tuple(one for one in (path, *path.parents) if not one.exists())
        try:
            with naming_faults("make the folder", path):
                path.mkdir(parents=True, exist_ok=True)
            for one in made[1:]:
                self.sync_folder(one.parent)
        except BaseException:
            with contextlib.suppress(StorageError):
                self.remove_folders_if_empty(made)
            raise
        return made

    def remove_folders_if_empty(self, paths: Iterable[Path]) -> None:
        """Remove folders, from the innermost on, up to the first in which something is left."""
        for path in paths:
            self.remove_folder_if_empty(path)

    def remove_folder_if_empty(self, path: Path) -> None:
        """Remove a folder unless something is left in it."""
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise StorageError(error.errno, f"could not remove the folder: {error}") from error

    def lock(self, path: Path) -> int:
        """Open and lock a file for this process alone; closing it by :meth:`close` frees it.

        A symbolic link is refused: what it points to is not ours to write. Where the file
        system has no locks, what the file says is the lock.
        """
        with naming_faults("lock the folder", path):
            return lock_file(path)

    def check_unlocked(self, path: Path) -> None:
        """Raise :class:`FolderInUseError` if a process has that lock; nothing is changed."""
        with naming_faults("look at the lock of the folder", path):
            check_unlocked(path)


def _sync(fd: int) -> None:
    """Wait until the device has it; on macOS fsync(2) leaves it in the device's volatile cache."""
    if _FULL_SYNC is not None:
        try:
            fcntl.fcntl(fd, _FULL_SYNC)
        except OSError as error:
            if error.errno not in _CANNOT_FULL_SYNC:
                raise
        else:
            return
    os.fsync(fd)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _nearest(path: Path) -> Path:
    """Give the path, or the folder nearest above it that is there."""
    with naming_faults("look at the folder", path):
        while not path.exists():
            path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Tell the free bytes of the file system that holds ``path`` or will hold it."""
    place = _nearest(path)
    with naming_faults("ask for the free space of", place):
        return shutil.disk_usage(place).free


def memory_file_system(path: Path) -> str | None:
    """Name the RAM-backed file system that ``path`` is or would be on, if it is on one."""
    path = Path(os.path.realpath(_nearest(path)))
    best: tuple[int, str] = (-1, "")
    try:
        with open(proc("self/mountinfo"), encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = _OCTAL_ESCAPE.sub(lambda one: chr(int(one[1], 8)), left.split(" ")[4])
                if path.is_relative_to(point) and len(point) >= best[0]:
                    best = (len(point), right.split()[0])
    except OSError:
        return None
    return best[1] if best[1] in _MEMORY_FILE_SYSTEMS else None


def _open_direct(path: Path, mode: int) -> int | None:
    flag = of_linux(os, "O_DIRECT")
    if flag is None:
        return None
    try:
        return os.open(path, mode | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # not on this file system
            return None
        raise
