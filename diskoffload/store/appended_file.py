"""A file written from front to back, whose length is known only when it ends."""

from __future__ import annotations

from pathlib import Path

from diskoffload.store.partial_file import PartialFile, partial_path
from diskoffload.system.files import Files


class AppendedFile:
    """A file that takes bytes at its end.

    It has its name only when it is published; until then ``.partial`` follows it, and it is as
    long as it may become. Not thread-safe.

    Attributes:
        path: the final name.
        end: where the next bytes go.
    """

    def __init__(
        self, path: Path, files: Files, head_bytes: int, most_bytes: int, end: int | None = None
    ) -> None:
        """Begin, or go on.

        Args:
            path: the final name.
            files: the file operations.
            head_bytes: left free at the beginning; :meth:`publish` fills them.
            most_bytes: what the file will have at the most.
            end: up to where an earlier writer has written durably; ``None`` begins anew.

        Raises:
            StorageError: the file cannot be opened or made.
        """
        self.path = path
        self.end = head_bytes if end is None else end
        self._files = files
        partial = partial_path(path)
        if end is None:
            files.remove(partial)
            fd = files.create(partial)
        else:
            fd = files.open_for_writing(partial)
        self._file = PartialFile(path, files, fd, most_bytes)
        try:
            files.set_size(fd, most_bytes, partial)
        except BaseException:
            self.leave()
            raise

    def append(self, data: memoryview) -> None:
        """Take the next bytes; they are copied.

        Raises:
            StorageError: bytes cannot be written, these or earlier ones.
        """
        self._file.write(data, self.end)
        self.end += len(data)

    def sync(self) -> None:
        """Make all that was appended durable; raises as :meth:`PartialFile.sync` does."""
        self._file.sync()

    def publish(self, head: bytes) -> None:
        """Fill the beginning, and give the file its name, durably.

        Raises:
            StorageError: the system refuses; the file is still there to :meth:`leave`.
        """
        self._file.end_direct()
        self._file.put(memoryview(head), 0)
        self._files.set_size(self._file.fd, self.end, self._file.partial)
        self._file.publish(durable=True)

    def leave(self) -> None:
        """Close the file and leave what was synced of it, to go on with."""
        self._file.leave()
