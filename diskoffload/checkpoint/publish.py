"""Make a folder appear at one stroke: built beside its place, then renamed or exchanged."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from diskoffload.checkpoint.source import INDEX_SUFFIX
from diskoffload.errors import (
    InvalidInputError,
    NoSpaceError,
    OutputExistsError,
    StorageError,
)
from diskoffload.planning import format_bytes
from diskoffload.store.journal import JOURNAL_NAME, NEW_SUFFIX
from diskoffload.store.lock import LOCK_NAME
from diskoffload.store.marker import MARKER_NAME
from diskoffload.store.sweeping import sweep_unfinished
from diskoffload.system.files import Files, free_bytes, naming_faults

_log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".partial",
    }
)
RECORD_NAME = "diskoffload-quantized.json"
"""Says which job a result of ``quantize`` is of; it is of no other checkpoint."""
# A file beside the weights that is larger than this is no tokenizer or config.
_MAX_SIDE_FILE_BYTES = 256 << 20
_SPARE_BYTES = 16 << 20
_OURS = frozenset((JOURNAL_NAME, JOURNAL_NAME + NEW_SUFFIX, LOCK_NAME, MARKER_NAME, RECORD_NAME))
# What only an offload folder has.
_MARKS = (JOURNAL_NAME, LOCK_NAME, MARKER_NAME)


def check_output(out: Path, overwrite: bool, advice: str = "") -> None:
    """Refuse an output path that is taken.

    Raises:
        OutputExistsError: something is there and ``overwrite`` is false.
        InvalidInputError: a file is there, or a parent that is no folder.
    """
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"cannot write a checkpoint to {out}: it is a file, not a folder")
    if overwrite and any((out / name).exists() for name in _MARKS):
        raise InvalidInputError(
            f"cannot write a checkpoint to {out}: it is an offload folder, and what lies in it "
            "would be lost; name another one"
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"cannot write a checkpoint to {out}: the folder exists and is not empty; name another "
            f"one{advice}"
        )


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot be ended.

    Raises:
        NoSpaceError: says how much is missing, and where.
    """
    free = free_bytes(out if out.is_dir() else out.parent)
    if free < needed_bytes + _SPARE_BYTES:
        missing = needed_bytes + _SPARE_BYTES - free
        raise NoSpaceError(
            f"cannot write {format_bytes(needed_bytes)} to {out}: {format_bytes(free)} are free "
            f"there, {format_bytes(missing)} too little; free some space or name another place"
        )


@contextlib.contextmanager
def new_folder(out: Path, files: Files, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to build in; when the body has ended well it takes the place of ``out``.

    With ``overwrite``, what else lies in an existing ``out`` (not weights, and not written
    anew) is carried over, and the two folders are exchanged at one stroke where the system
    can: a kill at any moment leaves one whole checkpoint at ``out``, or, where it cannot,
    at the name with ``.old`` in it.
    """
    check_output(out, overwrite, ", or pass overwrite=True")
    parents = files.make_folder(out.parent)
    building = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    fd = -1
    try:
        if parents:
            files.sync_folder(out.parent.parent)
        with contextlib.suppress(PermissionError):  # a place that may be written but not listed
            sweep_unfinished(out.parent, files, name=out.name)
        files.make_folder(building)
        fd = files.lock(building / LOCK_NAME)  # tells a sweep that it is still being written
        yield building
        if out.is_dir():
            _carry_over(out, building)
        files.remove(building / LOCK_NAME)
        _sync_all(building, files)
        if not out.exists():
            files.rename(building, out)
        elif not any(out.iterdir()):
            files.remove_folder_if_empty(out)
            files.rename(building, out)
        elif not files.exchange(building, out):
            old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
            files.rename(out, old)
            files.rename(building, out)
            files.rename(old, building)
        files.sync_folder(out.parent)
    finally:
        # After an exchange this is the old checkpoint, before it the unfinished new one.
        with contextlib.suppress(OSError):
            (building / LOCK_NAME).touch()  # if we are killed now, a sweep may have the rest
        shutil.rmtree(building, ignore_errors=True)
        if fd >= 0:
            files.close(fd)
        with contextlib.suppress(StorageError):  # of a failed save
            files.remove_folders_if_empty(parents)


def _sync_all(folder: Path, files: Files) -> None:
    """Make durable what others wrote there, like a config; weights are so already."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            files.sync_folder(path)
        elif path.is_file() and not path.is_symlink():
            with files.reading(path) as fd:
                files.sync(fd, path)


def _carry_over(old: Path, new: Path) -> None:
    """Link or copy what is not the old checkpoint's and not written anew."""
    for source in old.rglob("*"):
        relative = source.relative_to(old)
        target = new / relative
        if source.is_dir() and not source.is_symlink():
            continue
        is_weights = len(relative.parts) == 1 and (
            source.suffix == ".safetensors" or source.name.endswith(INDEX_SUFFIX)
        )
        if is_weights or target.exists() or relative == Path(RECORD_NAME):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with naming_faults("carry over the file", source):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what lies beside a checkpoint's weights (tokenizer, templates, licence).

    Hidden files, weights of any format, and what is in ``target`` already are left out; so are,
    with a warning, links to what is no part of the checkpoint: one made by others could have a
    file of the user's published.

    Returns:
        The names of the files copied, relative to the folder.
    """
    copied = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or len(relative.parts) > 2:
            continue
        if not path.is_file() or path.suffix in WEIGHT_SUFFIXES or path.name in _OURS:
            continue
        if path.name.endswith(INDEX_SUFFIX) or path.name.endswith(".bin.index.json"):
            continue
        if (target / relative).exists() or path.stat().st_size > _MAX_SIDE_FILE_BYTES:
            continue
        if not _is_part_of(source, path):
            _log.warning(
                "%s is a link to %s, outside of the checkpoint, and is not copied; copy it "
                "yourself if it belongs to the result",
                path,
                path.resolve(),
            )
            continue
        (target / relative).parent.mkdir(exist_ok=True)
        with naming_faults("copy the file", path):
            shutil.copyfile(path, target / relative)
        copied.append(str(relative))
    return copied


def _is_part_of(folder: Path, path: Path) -> bool:
    real, within = path.resolve(), folder.resolve()
    if real.is_relative_to(within):
        return True
    # The Hugging Face cache: models--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST.
    blobs = within.parent.parent / "blobs"
    return within.parent.name == "snapshots" and real.parent == blobs


def write_text(path: Path, text: str, files: Files) -> None:
    """Write a small file durably; it must not exist yet."""
    with files.writing(path, new=True) as fd:
        files.write(fd, memoryview(text.encode("utf-8")), 0, path)
        files.sync(fd, path)
