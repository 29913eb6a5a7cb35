"""One process at a time writes a result."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from diskoffload.errors import FolderInUseError, StorageError
from diskoffload.system.files import Files

LOCK_NAME = "diskoffload-unfinished.lock"
_log = logging.getLogger(__name__)


class FolderLock:
    """This process's right to write a result; a context manager.

    The lock goes with its process, so one that a killed process left is simply taken over.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        """Lock a folder, and make it if need be.

        Raises:
            FolderInUseError: another process has it.
            StorageError: it cannot be made or locked.
        """
        self._folder = folder
        self._files = files
        self._pid = os.getpid()
        self._is_held = True
        self._made = files.make_folder(folder)
        try:
            self._fd = files.lock(folder / LOCK_NAME)
        except StorageError as error:
            with suppress(StorageError):
                files.remove_folders_if_empty(self._made)
            if not isinstance(error, FolderInUseError):
                raise
            # Its words are those of an offload folder.
            said = str(error.strerror).replace("another offload_dir", "another result")
            raise FolderInUseError(error.errno, said, str(folder)) from error

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def moved_to(self, folder: Path) -> None:
        """Take note that the folder has another name now, and stays."""
        self._folder = folder
        self._made = ()

    def release(self) -> None:
        """Remove the lock, if that was not done, and folders that we made if they are empty."""
        if not self._is_held or os.getpid() != self._pid:  # in a forked child it is its parent's
            return
        self._is_held = False
        try:
            self._files.remove(self._folder / LOCK_NAME)
            self._files.remove_folders_if_empty(self._made)
        except StorageError as error:
            _log.warning("%s", error)
        finally:
            self._files.close(self._fd)
