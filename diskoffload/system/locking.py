"""Locks on files: the system's own, or, where it has none, a file that says who has it.

Network file systems may refuse ``flock``. There each process that wants the lock appends one
line to the file, its claim, and the first claim of a process that lives is the lock. A claim
is dead when its process is: by its pid, by the time at which that pid began (pids are used
again), and by the machine's boot. Whether a process of another machine lives nobody can say
here, so its claim always counts. The first claim of all is settled by ``O_EXCL``, which
network file systems keep between machines.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from diskoffload.errors import FolderInUseError
from diskoffload.system.portable import proc

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows is not promised
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# What a file system without locks answers (flock(2), and Linux's NFS and FUSE clients).
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# Who makes the file writes to it at once, unless it dies in between.
_PATIENCE_SECONDS = 1.0
_LOOK_SECONDS = 0.01
_MOST_CLAIMS_BYTES = 1 << 20
_DEAD = "dead"

Claim = dict[str, Any]
# By descriptor: the file, our token in it and the process that wrote it.
_claimed: dict[int, tuple[tuple[int, int], str, int]] = {}


def lock_file(path: Path) -> int:
    """Open and lock a file for this process alone; see :func:`unlock` for how to free it.

    A symbolic link is refused: what it points to is not ours to write.

    Raises:
        FolderInUseError: another process, or this one, has it.
        OSError: it cannot be opened or locked.
    """
    while True:
        fd, made = _opened(path)
        try:
            _lock(fd, path, made)
            # Its last owner may have removed it after we opened it; then a third process
            # would make and lock another.
            if _is_at(fd, path):
                if fd not in _claimed:
                    _sign(fd)
                return fd
        except BaseException:
            unlock(fd)
            os.close(fd)
            raise
        unlock(fd)
        os.close(fd)


def check_unlocked(path: Path) -> None:
    """Raise :class:`FolderInUseError` if a process has a lock file now; nothing is changed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _try(fd, path, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        _refuse_if_claimed(_claims(fd), {**_describe(os.getpid()), "token": ""}, path)
    finally:
        os.close(fd)


def unlock(fd: int) -> None:
    """Free a lock that is a claim; to be called before its descriptor is closed.

    The system's own locks go with the descriptor. Other descriptors are left alone.
    """
    file, token, pid = _claimed.get(fd, ((0, 0), "", 0))
    if not token:
        return
    del _claimed[fd]
    with suppress(OSError):  # the folder may be gone, and the claim with it
        status = os.fstat(fd)
        is_ours = (status.st_dev, status.st_ino) == file and pid == os.getpid()
        # The number may have been closed behind our back and stand for another file by now.
        if is_ours and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
            _append(fd, {"withdrawn": token})


def _opened(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, flags), False


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    """Say who has it, for messages; the lock does not depend on it, nor on room on the disk."""
    with suppress(OSError):
        os.truncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode("ascii"))


def _try(fd: int, path: Path, kind: int) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
        raise FolderInUseError(
            errno.EAGAIN,
            f"the folder is in use by another process (pid {owner}); "
            "wait for it to end, or name another offload_dir",
            str(path.parent),
        ) from error


def _lock(fd: int, path: Path, made: bool) -> None:
    try:
        _try(fd, path, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        _log.warning(
            "the file system of %s has no locks (%s): processes keep each other out by what "
            "they write to %s",
            path.parent,
            error.strerror,
            path.name,
        )
        _claim(fd, path, made)


# ---------------------------------------------------------------------- claims


def _claim(fd: int, path: Path, made: bool) -> None:
    mine = {**_describe(os.getpid()), "token": uuid.uuid4().hex}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not made and not _claims(fd) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    _refuse_if_claimed(_claims(fd), mine, path)  # most often so, and nothing need be written
    _append(fd, mine)
    status = os.fstat(fd)
    _claimed[fd] = ((status.st_dev, status.st_ino), mine["token"], os.getpid())
    _refuse_if_claimed(_claims(fd), mine, path)


def _append(fd: int, line: Claim) -> None:
    # On a line of its own, whatever was cut off before it.
    os.write(fd, b"\n" + json.dumps(line).encode("ascii") + b"\n")


def _claims(fd: int) -> list[Claim]:
    """Read the claims that were not withdrawn, oldest first; what is no claim is passed over."""
    found: dict[str, Claim] = {}
    for line in os.pread(fd, _MOST_CLAIMS_BYTES, 0).splitlines():
        try:
            claim = json.loads(line)
        except ValueError:
            continue
        if not isinstance(claim, dict):
            continue
        found.pop(str(claim.get("withdrawn")), None)
        if isinstance(claim.get("pid"), int) and isinstance(claim.get("token"), str):
            found[claim["token"]] = claim
    return list(found.values())


def _refuse_if_claimed(claims: list[Claim], mine: Claim, path: Path) -> None:
    for claim in claims:
        if claim["token"] == mine["token"]:
            return
        if any(claim.get(key) != mine[key] for key in ("host", "space")):
            # Of another boot of this machine it is dead, wherever it ran.
            if claim.get("host") == mine["host"] and _is_of_another_boot(claim, mine):
                continue
            advice = (
                f"its file system has no locks, and whether that process is alive cannot be seen "
                f"from {mine['host']}: if it is not, remove {path.name} there"
            )
        elif _lives(claim, mine):
            advice = "wait for it to end, or name another offload_dir"
        else:
            continue
        raise FolderInUseError(
            errno.EAGAIN,
            f"the folder is in use by another process (pid {claim['pid']} on "
            f"{claim.get('host')}); {advice}",
            str(path.parent),
        )


def _is_of_another_boot(claim: Claim, mine: Claim) -> bool:
    # Empty where the system does not say: on macOS, say. Nothing follows from that.
    return bool(claim.get("boot") and mine["boot"]) and claim["boot"] != mine["boot"]


def _lives(claim: Claim, mine: Claim) -> bool:
    if _is_of_another_boot(claim, mine):
        return False
    try:
        os.kill(claim["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it is another user's
    started, claimed = _started(claim["pid"]), claim.get("started")
    return started in ("", claimed) or not (claimed or started == _DEAD)  # may be hidden


def _describe(pid: int) -> Claim:
    """Say which process of which machine that is, so that no other is ever taken for it."""
    boot, space = "", ""
    with suppress(OSError):
        boot = Path(proc("sys/kernel/random/boot_id")).read_text("ascii").strip()
        space = os.readlink(proc("self/ns/pid"))  # a container counts its own
    host = socket.gethostname()
    return {"pid": pid, "started": _started(pid), "boot": boot, "space": space, "host": host}


def _started(pid: int) -> str:
    """Tell when a process began, in ticks since the boot; _DEAD of one that only waits to go.

    Empty where the system does not say (proc_pid_stat(5), field 22).
    """
    try:
        text = Path(proc(f"{pid}/stat")).read_text("utf-8", "replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return _DEAD if state in "ZX" else fields[18]
