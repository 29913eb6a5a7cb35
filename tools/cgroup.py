"""A real memory control group (cgroup) for child processes, made for a while and removed.

The kernel enforces the limit: a process that needs more than that of memory it cannot give
back is killed, while pages of files are merely dropped and read again. Both versions of the
controller are known; files and fields are those of the kernel's
``admin-guide/cgroup-v1/memory.rst`` and ``admin-guide/cgroup-v2.rst``.

Nothing of ours stays behind: a group is removed with everything in it when its ``with``
block ends, and what a killed process left is swept by the next one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

_PREFIX = "diskoffload-"
_PROBE_BYTES = 64 << 20
_SAMPLE_SECONDS = 0.01
_REMOVE_SECONDS = 10.0
# The shell joins the group before it becomes the command, so that not one page of the
# command's own is charged elsewhere. "$$" stays the same across exec.
_JOIN = 'echo $$ > "$0" || exit 125; exec "$@"'


class NoCgroupError(OSError):
    """A memory control group cannot be made or used here; the message says why."""


@dataclass(frozen=True)
class GroupRun:
    """How a command in a group ended.

    Attributes:
        returncode: its exit status; minus the signal's number if one ended it.
        stdout: what it printed, or ``""`` where that was not captured.
        stderr: likewise.
        peak_anonymous_bytes: most anonymous memory that the whole group had, sampled from
            outside every 10 ms; ``None`` if it ended before the first sample.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_anonymous_bytes: int | None


@dataclass(frozen=True)
class _Files:
    """What one version of the memory controller calls its files and fields."""

    version: int
    limit: str
    swap_limit: str
    peak: str
    events: str
    anonymous: str


_V1 = _Files(
    version=1,
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",  # memory and swap together
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",  # has "oom_kill" since Linux 4.13
    anonymous="total_rss",
)
_V2 = _Files(
    version=2,
    limit="memory.max",
    swap_limit="memory.swap.max",  # swap alone
    peak="memory.peak",  # since Linux 5.19
    events="memory.events",
    anonymous="anon",
)


@dataclass(frozen=True)
class MemoryCgroup:
    """A memory control group of ours; made by :func:`memory_cgroup`.

    Attributes:
        directory: where the kernel shows it.
        limit_bytes: what all processes in it may take together, file pages included.
        swap_is_limited: whether swapping cannot stretch that limit.
    """

    directory: Path
    limit_bytes: int
    swap_is_limited: bool
    _files: _Files = field(repr=False)

    @property
    def version(self) -> int:
        """Which version of the memory controller it is, 1 or 2."""
        return self._files.version

    def run(
        self,
        command: Sequence[str],
        *,
        capture: bool = True,
        timeout_seconds: float | None = None,
        **options: Any,
    ) -> GroupRun:
        """Run a command in the group and wait for its end.

        Args:
            command: program and arguments; it and its children belong to the group from
                their first page on.
            capture: keep what it prints; else it prints where we do.
            timeout_seconds: how long it may take.
            options: further ones of :class:`subprocess.Popen` (``env``, ``cwd``, ...).

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        pipe = subprocess.PIPE if capture else None
        joining = ["/bin/sh", "-c", _JOIN, str(self.directory / "cgroup.procs"), *command]
        started_seconds = time.monotonic()
        peaks: list[int] = []
        with subprocess.Popen(
            joining, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, **options
        ) as process:
            try:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        stdout, stderr = process.communicate(timeout=_SAMPLE_SECONDS)
                        break
                    peaks = [max([self.anonymous_bytes(), *peaks])]
                    elapsed_seconds = time.monotonic() - started_seconds
                    if timeout_seconds is not None and elapsed_seconds > timeout_seconds:
                        raise subprocess.TimeoutExpired(list(command), timeout_seconds)
            except BaseException:
                process.kill()
                raise
        return GroupRun(process.returncode, stdout or "", stderr or "", peaks[0] if peaks else None)

    def peak_bytes(self) -> int | None:
        """Most that was ever charged to it, file pages included; ``None`` if not counted."""
        text = _read(self.directory / self._files.peak)
        return int(text) if text else None

    def anonymous_bytes(self) -> int:
        """Anonymous memory of its processes now, as of the kernel's last count."""
        return self._field("memory.stat", self._files.anonymous) or 0

    def oom_kills(self) -> int | None:
        """How many processes the kernel killed for want of memory; ``None`` if not counted."""
        return self._field(self._files.events, "oom_kill")

    def _field(self, file: str, name: str) -> int | None:
        for line in _read(self.directory / file).splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        return None


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a memory control group below our own, and remove it in the end.

    With version 2 it is beside our own instead, or wherever above us the memory controller
    is handed down: a group of that version holds either processes or groups. What is still
    running in it at the end is killed.

    Args:
        limit_bytes: what its processes may take together; the kernel rounds to pages.

    Raises:
        NoCgroupError: that is not possible here; says why.
    """
    parent, files = _parent()
    _sweep(parent)
    directory = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir()
    except OSError as error:
        raise NoCgroupError(
            f"cannot make a control group in {parent}: {error.strerror}; that takes root, or "
            "a group that was delegated to the user"
        ) from error
    try:
        try:
            (directory / files.limit).write_text(str(limit_bytes))
        except OSError as error:
            raise NoCgroupError(
                f"cannot limit the control group {directory}: {error.strerror}"
            ) from error
        yield MemoryCgroup(
            directory, limit_bytes, _limit_swap(directory, files, limit_bytes), files
        )
    finally:
        _remove(directory)


def why_not() -> str | None:
    """Say why a memory control group cannot be made here, by trying; ``None`` if it can."""
    try:
        with memory_cgroup(_PROBE_BYTES) as group:
            run = group.run(["true"])
    except OSError as error:
        return str(error)
    if run.returncode:
        return f"a process cannot join the control group: {run.stderr.strip()}"
    return None


# ---------------------------------------------------------------------- making and removing


def _limit_swap(directory: Path, files: _Files, limit_bytes: int) -> bool:
    """Keep anonymous memory from leaving for swap; tell whether it worked."""
    try:
        (directory / files.swap_limit).write_text(str(limit_bytes if files is _V1 else 0))
    except OSError:
        # The kernel does not account for swap, which is harmless where there is none.
        return len(_read(Path("/proc/swaps")).splitlines()) < 2
    return True


def _remove(directory: Path) -> None:
    deadline_seconds = time.monotonic() + _REMOVE_SECONDS
    while True:
        for pid in _read(directory / "cgroup.procs").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with suppress(OSError):
            # Version 1 keeps a removed group in the kernel as long as file pages are charged to it.
            (directory / "memory.force_empty").write_text("0")
        try:
            return directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # The kernel is busy with the last process for a while after it was reaped.
            if time.monotonic() > deadline_seconds:
                raise
            time.sleep(0.02)


def _sweep(parent: Path) -> None:
    """Remove the groups of ours whose maker is dead; one with processes in it stays."""
    for directory in parent.glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                directory.rmdir()


# ---------------------------------------------------------------------- finding our place


def _parent() -> tuple[Path, _Files]:
    """Find the group in which ours will be made.

    Raises:
        NoCgroupError: there is none.
    """
    if not sys.platform.startswith("linux"):
        raise NoCgroupError("control groups exist on Linux only")
    unified: str | None = None
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return _directory("cgroup", "memory", path)[0], _V1
        if hierarchy == "0" and not controllers:
            unified = path
    if unified is None:
        raise NoCgroupError("this process belongs to no control group with memory")
    own, top = _directory("cgroup2", "", unified)
    for candidate in (own, *own.parents):
        if "memory" in _read(candidate / "cgroup.subtree_control").split():
            return candidate, _V2
        if candidate == top:
            break
    raise NoCgroupError(f"no control group from {own} up to {top} hands the memory controller down")


def _directory(kind: str, option: str, path: str) -> tuple[Path, Path]:
    """Find where a hierarchy shows a group, and where that hierarchy is mounted."""
    for line in reversed(_read(Path("/proc/self/mountinfo")).splitlines()):
        front, _, back = line.partition(" - ")
        root, point = (_unescaped(text) for text in front.split(" ")[3:5])
        type_, _, options = back.split(" ", 2)
        if type_ != kind or (option and option not in options.split(",")):
            continue
        below = PurePosixPath(path)
        if below.is_relative_to(root):
            below = below.relative_to(root)
            directory = Path(point).joinpath(*below.parts)
            if directory.is_dir():
                return directory, Path(point)
    raise NoCgroupError(f"no mounted control group file system shows our own group {path}")


def _unescaped(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: Path) -> str:
    """Give a file's text, or ``""`` where it is absent, gone or unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
