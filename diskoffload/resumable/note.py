"""The note in an unfinished result: whose it is and how much is done.

Small, replaced at one stroke and checksummed, so that it is whole or refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from diskoffload.checkpoint.publish import write_text
from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.system.files import Files

NOTE_NAME = "diskoffload-unfinished.json"
NEW_NOTE_NAME = NOTE_NAME + ".new"
_FORMAT = 2
_MAX_BYTES = 64 << 20  # more than any note has


def read_note(folder: Path, files: Files, name: str = NOTE_NAME) -> dict[str, Any] | None:
    """Give what the note in a folder says; ``None`` where there is none.

    Args:
        folder: an unfinished result, or a finished one.
        files: the file operations.
        name: of the note.

    Raises:
        DamagedFileError: it is not what was written, or of another version.
        StorageError: it cannot be read.
    """
    path = folder / name
    if not path.exists():
        return None
    with _naming_damage(path):
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        found = json.loads(files.read(path))
        if not isinstance(found, dict) or not isinstance(found.get("note"), dict):
            raise ValueError("it holds no note")
        if found.get("format") != _FORMAT:
            raise ValueError(f"it is of format {found.get('format')!r}, not {_FORMAT}")
        if found.get("xxh3_64") != _checksum(found["note"]):
            raise ValueError("its checksum is wrong")
    note: dict[str, Any] = found["note"]
    return note


def write_note(folder: Path, note: dict[str, Any], files: Files) -> None:
    """Replace a folder's note, durably and at one stroke.

    Raises:
        StorageError: the old one is still there, or perhaps the new one.
    """
    new = folder / NEW_NOTE_NAME
    files.remove(new)
    write_text(new, note_text(note), files)
    files.rename(new, folder / NOTE_NAME)
    files.sync_folder(folder)


def note_text(note: dict[str, Any]) -> str:
    """Give the content of a note's file: the note, its format and its checksum."""
    content = {"format": _FORMAT, "xxh3_64": _checksum(note), "note": note}
    return json.dumps(content, indent=1) + "\n"


def remove_note(folder: Path, files: Files) -> None:
    """Remove a folder's note, and what a killed process may have left of a newer one."""
    files.remove(folder / NEW_NOTE_NAME)
    files.remove(folder / NOTE_NAME)


def _checksum(note: dict[str, Any]) -> str:
    text = json.dumps(note, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode("ascii"))


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} says whose result this is and how much of it is done, and it is damaged "
            f"({error}), so nothing in its folder can be trusted; remove the folder to begin anew"
        ) from error
