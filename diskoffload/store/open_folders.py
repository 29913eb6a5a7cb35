"""The offload folders that this process has open, so that one path is one folder."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from diskoffload.errors import InvalidInputError
from diskoffload.store.folder import Folder


class OpenFolders:
    """The folders that are open now, so that one path is one folder. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_path: weakref.WeakValueDictionary[str, Folder] = weakref.WeakValueDictionary()

    def at(self, place: Folder | Path | str | None) -> Folder:
        """Give the folder at a path, opening it if this process has not yet.

        Raises:
            InvalidInputError: the place is neither a path nor a folder.
        """
        if isinstance(place, Folder):
            return place
        if place is None:
            made = Folder()
            with self._lock:  # whoever has asked where it is may name it
                self._by_path[os.path.realpath(made.path)] = made
            return made
        if not isinstance(place, (str, os.PathLike)):
            raise InvalidInputError(f"offload_dir must be a path, not {type(place).__name__}")
        key = os.path.realpath(os.path.expanduser(place))
        with self._lock:
            folder = self._by_path.get(key)
            if folder is None or not folder.is_open:
                folder = Folder(place)
                self._by_path[key] = folder
            return folder


open_folders = OpenFolders()
"""A folder's lock is held by the process, so the process must know which it holds."""
