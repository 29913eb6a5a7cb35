"""What of a result lies finished in ``OUT.partial``, noted so that a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diskoffload.checkpoint.publish import write_text
from diskoffload.errors import OutputExistsError
from diskoffload.quantize.plan import Job

STATE_NAME = "diskoffload-quantize.json"
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own (stat(2))


class State:
    """What of a job lies finished in ``OUT.partial``, and whether it is this job's."""

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder = folder
        self._path = folder / STATE_NAME
        self._files = job.files
        self._identity = _identity(job)
        self.done: set[str] = set()
        if not folder.exists() or not any(folder.iterdir()):
            return
        found = self._read()
        if found.get("job") != self._identity:
            raise OutputExistsError(
                f"{folder} is there and belongs to another source, scheme, dtype or ignore list; "
                "remove it, or name another result"
            )
        here = {path.name.removesuffix(".partial") for path in folder.glob("*.safetensors*")}
        gone = {
            planned[0]
            for file, items in job.layout.files.items()
            for planned in items
            if file not in here
        }
        # A file may be gone although it was noted: a full disk can forbid to take a note back.
        noted = set(found.get("done", ()))
        self.done = {name for name in noted if gone.isdisjoint(job.outputs.get(name, gone))}

    @property
    def written_bytes(self) -> int:
        """Bytes of the result that lie on disk already."""
        if not self._folder.exists():
            return 0
        # Blocks, not lengths: a file has its full length from the start.
        found = [path.stat() for path in self._folder.glob("*.safetensors*")]
        return sum(getattr(one, "st_blocks", 0) * _BLOCK_BYTES for one in found)

    def begin(self) -> None:
        """Make the folder and say whose it is."""
        self._files.make_folder(self._folder)
        if not self._path.exists():
            self.store(())

    def store(self, done: Iterable[str]) -> None:
        """Write down which tensors are done, durably and at one stroke."""
        new = self._path.with_suffix(".new")
        self._files.remove(new)
        text = json.dumps({"job": self._identity, "done": list(done)}, indent=1)
        write_text(new, text, self._files)
        self._files.rename(new, self._path)
        self._files.sync_folder(self._folder)

    def forget(self) -> None:
        """Remove the note, because the result is complete."""
        self._files.remove(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _identity(job: Job) -> dict[str, Any]:
    shards = {
        name: [shard.header.file_bytes, shard.path.stat().st_mtime_ns]
        for name, shard in job.checkpoint.shards.items()
    }
    return {
        "source": str(job.checkpoint.path),
        "shards": shards,
        "scheme": job.scheme.name,
        "dtype": job.plan.dtype,
        "ignored": list(job.targets.ignore),
        "quantized": len(job.targets.weights),
        "files": {name: len(planned) for name, planned in job.layout.files.items()},
    }
