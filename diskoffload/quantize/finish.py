"""The last steps: what stands beside a result's weights, and its name.

Each may be cut off anywhere and is then done again: files appear whole, the note goes last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diskoffload.checkpoint.publish import copy_side_files, write_text
from diskoffload.checkpoint.source import CONFIG_NAME
from diskoffload.quantize.config import config_of_result
from diskoffload.quantize.lock import FolderLock
from diskoffload.quantize.plan import Job
from diskoffload.quantize.state import State
from diskoffload.system.files import Files

_SIDE_FOLDER = "diskoffload-quantize.side"


def finish(job: Job, partial: Path, out: Path, state: State, lock: FolderLock) -> None:
    """Make a folder of finished weights the result.

    Raises:
        StorageError: a step failed; repeating the command repeats it.
    """
    files = job.files
    index = job.layout.index_json()
    if index is not None:
        _write_anew(partial / job.layout.index_name, index, files)
    config = json.dumps(config_of_result(job), indent=2) + "\n"
    _write_anew(partial / CONFIG_NAME, config, files)
    _add_side_files(job.checkpoint.folder, partial, files)
    files.sync_folder(partial)
    if out.is_dir():
        files.remove_folder_if_empty(out)
    files.rename(partial, out)
    lock.moved_to(out)
    files.sync_folder(out.parent)
    # The note goes last: as long as it is there, the command can be repeated.
    lock.release()
    state.forget(out)


def _write_anew(path: Path, text: str, files: Files) -> None:
    files.remove(path)
    write_text(path, text, files)


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
