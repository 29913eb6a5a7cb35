"""Find and remove what processes that died have left on disk, and only what is ours."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from diskoffload.errors import FolderInUseError, StorageError
from diskoffload.store.commits import Commits
from diskoffload.store.journal import JOURNAL_NAME, NEW_SUFFIX, Journal
from diskoffload.store.lock import LOCK_NAME, leftovers
from diskoffload.system.files import Files, naming_faults

# What tempfile makes of the prefix that folders without a name of their own get.
_TEMPORARY = re.compile(r"diskoffload-[a-z0-9_]{8}")
# A result that was being saved: beside its place, and locked until it is whole.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class Left:
    """A file that nobody needs any more.

    Attributes:
        path: the file.
        nbytes: its length.
    """

    path: Path
    nbytes: int


def sweep(path: Path | str, *, dry_run: bool = False) -> list[Left]:
    """Remove what dead processes left in an offload folder, or in folders of ours inside a place.

    Only files of our own making go: shards that no commit refers to, begun ones, locks that
    nobody holds; results that a killed ``save_checkpoint`` had begun, beside their place. What
    was committed stays, and so does every file of others, and any folder that a process is
    using. A temporary folder that is empty then goes too.

    Args:
        path: an offload folder, or a place where temporary ones are made (``/tmp``) or results
            are saved.
        dry_run: remove nothing.

    Returns:
        What was, or would be, removed.

    Raises:
        StorageError: the path is no folder, or a file cannot be removed.
        FolderInUseError: a process is using the folder.
        DamagedFileError: the folder's journal is damaged, so it is not known what to keep.
    """
    place = Path(path).expanduser().absolute()
    if not place.is_dir():
        raise StorageError(f"{place} is no folder: name an offload folder, or where they are made")
    files = Files()
    found = _sweep_one(place, files, dry_run=dry_run)
    for inner in sorted(place.iterdir()):
        if _TEMPORARY.fullmatch(inner.name) and inner.is_dir() and not inner.is_symlink():
            try:
                found += _sweep_one(inner, files, dry_run=dry_run)
                if not dry_run:
                    files.remove_folder_if_empty(inner)
            except FolderInUseError:
                continue
    return found + sweep_unfinished(place, files, dry_run=dry_run)


def sweep_unfinished(
    place: Path, files: Files, *, name: str | None = None, dry_run: bool = False
) -> list[Left]:
    """Remove results that a killed process had begun to save in a place.

    Args:
        place: the folder that they were to appear in.
        files: the file operations.
        name: only of the result of that name.
        dry_run: remove nothing.
    """
    found = []
    for inner in sorted(place.iterdir()):
        match = _UNFINISHED.fullmatch(inner.name)
        if match is None or name not in (None, match["name"]) or inner.is_symlink():
            continue
        lock = inner / LOCK_NAME
        if not lock.is_file():
            continue  # of others, or only just made
        try:
            files.check_unlocked(lock)
        except FolderInUseError:
            continue
        paths = [path for path in inner.rglob("*") if path.is_file() and not path.is_symlink()]
        found += [Left(path, path.stat().st_size) for path in paths]
        if not dry_run:
            with naming_faults("remove the folder", inner):
                shutil.rmtree(inner)
    return found


def _sweep_one(folder: Path, files: Files, *, dry_run: bool) -> list[Left]:
    lock = folder / LOCK_NAME
    ours = [*leftovers(folder), folder / (JOURNAL_NAME + NEW_SUFFIX)]
    if not lock.exists() and not any(path.exists() for path in ours):
        return []
    if dry_run:
        if lock.exists():
            files.check_unlocked(lock)
        return _unneeded(Commits(Journal(folder, files)), ours, lock if lock.exists() else None)
    had_lock = lock.exists()
    fd = files.lock(lock)
    try:
        commits = Commits(Journal(folder, files))
        commits.make_durable()
        found = _unneeded(commits, ours, lock if had_lock else None)
        for one in found:
            if one.path != lock:
                files.remove(one.path)
    finally:
        files.remove(lock)
        files.close(fd)
    return found


def _unneeded(commits: Commits, ours: list[Path], lock: Path | None) -> list[Left]:
    kept = commits.last.shards
    found = [Left(one, one.stat().st_size) for one in ours if one.exists() and one.name not in kept]
    return found if lock is None else [*found, Left(lock, 0)]
