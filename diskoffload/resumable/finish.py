"""The last steps: what stands beside a result's weights, and its name.

Each may be cut off anywhere and is then done again: files appear whole, the note goes last.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from diskoffload.checkpoint.publish import copy_side_files
from diskoffload.resumable.claim import Claim
from diskoffload.resumable.lock import FolderLock
from diskoffload.system.files import Files

_SIDE_FOLDER = "diskoffload-unfinished.side"


def finish(
    partial: Path,
    out: Path,
    own_files: Mapping[str, bytes],
    source: Path | None,
    files: Files,
    lock: FolderLock,
    claim: Claim,
) -> None:
    """Make a folder of finished weights the result.

    Args:
        partial: the folder.
        out: the result's name.
        own_files: by name, the content of files to write beside the weights.
        source: the folder from which what else lies beside its weights is copied, if any is.
        files: the file operations.
        lock: of ``partial``; released in the end.
        claim: to ``partial``; forgotten in the end.

    Raises:
        StorageError: a step failed; repeating the command repeats it.
    """
    for name, content in own_files.items():
        files.remove(partial / name)
        with files.writing(partial / name, new=True) as fd:
            files.write(fd, memoryview(content), 0, partial / name)
            files.sync(fd, partial / name)
    if source is not None:
        _add_side_files(source, partial, files)
    files.sync_folder(partial)
    if out.is_dir():
        files.remove_folder_if_empty(out)
    files.rename(partial, out)
    lock.moved_to(out)
    files.sync_folder(out.parent)
    # The note goes last: as long as it is there, the command can be repeated.
    lock.release()
    claim.forget(out)


def _add_side_files(source: Path, partial: Path, files: Files) -> None:
    """Copy the tokenizer and the like, each at one stroke: half a copy looks like a whole one."""
    side = partial / _SIDE_FOLDER
    shutil.rmtree(side, ignore_errors=True)
    files.make_folder(side)
    for name in copy_side_files(source, side):
        if (partial / name).exists():
            continue
        with files.reading(side / name) as fd:
            files.sync(fd, side / name)
        files.make_folder((partial / name).parent)
        files.rename(side / name, partial / name)
        if (partial / name).parent != partial:
            files.sync_folder((partial / name).parent)
    shutil.rmtree(side, ignore_errors=True)
