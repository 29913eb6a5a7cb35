"""The mark of a folder that holds commits, which tells that a journal was lost.

Without it a folder without a journal looks like scratch that a dead process left, and what was
committed would be swept. It appears after the first commit is durable, so a kill can only leave
a commit without a mark (the next one to open the folder makes it), never a mark without a commit.
Its name is unlike those of our other files: who removes ``diskoffload.*`` leaves it.
"""

from __future__ import annotations

from pathlib import Path

from diskoffload.system.files import Files, naming_faults

MARKER_NAME = "holds-commits.txt"
_TEXT = (
    "Tensors that were committed with diskoffload lie in this folder. diskoffload.journal says "
    "what is where in the diskoffload-*.safetensors files: keep all of them together.\n"
)


class Marker:
    """One folder's mark."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.path = folder / MARKER_NAME
        self._files = files

    def is_there(self) -> bool:
        """Whether something was ever committed in the folder."""
        with naming_faults("look for the file", self.path):
            return self.path.is_file()

    def leave(self) -> None:
        """Mark the folder, durably; what the file says is for people.

        Raises:
            StorageError: it is not marked, or perhaps not; something of others may be there.
        """
        with self._files.writing(self.path, new=True) as fd:
            self._files.write(fd, memoryview(_TEXT.encode("ascii")), 0, self.path)
        self._files.sync_folder(self.path.parent)
