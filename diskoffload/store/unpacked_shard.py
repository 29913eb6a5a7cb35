"""The file that a packed one was made from, made again byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from diskoffload.store.appended_file import AppendedFile
from diskoffload.store.digests import Checking
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.packed_source import PackedSource
from diskoffload.store.stored import ShardTensor
from diskoffload.store.value_parts import value_parts
from diskoffload.system.files import Files


class UnpackedShard:
    """The unpacked form of one file, while it is written. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        source: PackedSource,
        files: Files,
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            path: the unpacked file's name.
            source: what is to be made again.
            files: the file operations.
            noted: what :meth:`note` gave after the last :meth:`sync` of an earlier writer.

        Raises:
            StorageError: a file cannot be made.
        """
        self._source = source
        self._specs = list(source.header.specs.values())
        self._count = 0 if noted is None else int(noted["count"])
        header = source.header
        end = None
        if noted is not None:
            last = self._specs[self._count - 1] if self._count else None
            end = last.offset + last.nbytes if last else header.data_offset
        self._file = AppendedFile(path, files, header.data_offset, header.file_bytes, end)

    @property
    def done(self) -> list[str]:
        """Names of the tensors that were written."""
        return [spec.name for spec in self._specs[: self._count]]

    @property
    def written_bytes(self) -> int:
        """Bytes of the file so far."""
        return self._file.end

    def note(self) -> dict[str, Any]:
        """Give what a later writer needs to go on from here, as :func:`json.dumps` takes it."""
        return {"count": self._count}

    def add(self, tensor: ShardTensor | EncodedTensor) -> None:
        """Write the next tensor of the file that is made again.

        Raises:
            DamagedFileError: its value is not the one that was packed.
            StorageError: it cannot be read, or the file cannot be written.
        """
        digest = xxhash.xxh3_128()
        for part in value_parts(tensor, digest):
            self._file.append(part)
        spec = tensor.spec
        expected = self._source.digests[spec.name]
        Checking(str(tensor.shard.path), spec.name, spec.offset, expected).compare(
            digest.hexdigest()
        )
        self._count += 1

    def sync(self) -> None:
        """Make durable what was written, so that :meth:`note` is true of it."""
        self._file.sync()

    def leave(self) -> None:
        """Close the file and leave what was synced of it."""
        self._file.leave()

    def publish(self) -> None:
        """Write the header, and give the file its name; every tensor must have been added."""
        self._file.publish(self._source.head)
