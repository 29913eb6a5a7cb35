"""A safetensors file being written; it has its name only when it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import xxhash

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.digests import (
    DIGESTS_KEY,
    digests_as_text,
    digests_to_come,
    needs_digest,
)
from diskoffload.store.header import LENGTH_BYTES, Header, Planned, build_header, parse_header
from diskoffload.store.partial_file import PartialFile, partial_path
from diskoffload.system.files import Files

Left = Literal["published", "begun", "nothing"]
"""What an earlier writer left of a file."""


def left_of(
    path: Path, tensors: Iterable[Planned], files: Files, metadata: Mapping[str, str] | None = None
) -> Left:
    """Tell what an earlier writer, made with the same arguments, left of its file.

    Header and length are compared; a file of others, or a truncated one, is ``"nothing"``.
    """
    raw, header = _plan(list(tensors), metadata, fill=False)
    if _is_the_one(path, len(raw), header, files):
        return "published"
    return "begun" if _is_the_one(partial_path(path), len(raw), header, files) else "nothing"


def _plan(
    tensors: list[Planned], metadata: Mapping[str, str] | None, *, fill: bool
) -> tuple[bytes, Header]:
    to_come = digests_to_come(name for name, _, _ in tensors)
    return build_header(tensors, {**(metadata or {}), DIGESTS_KEY: to_come}, fill=fill)


def _with_digests(raw: bytes, header: Header, digests: Mapping[str, str]) -> tuple[bytes, Header]:
    """Put the digests into a header where :func:`_plan` has left room for them."""
    text = digests_as_text(header, digests)
    # A key stands in quotes that are not escaped, so nothing else can look like it.
    before, after = (
        f"{json.dumps(DIGESTS_KEY)}:{json.dumps(one)}".encode("ascii")
        for one in (header.metadata[DIGESTS_KEY], text)
    )
    assert len(before) == len(after)
    assert raw.count(before) == 1
    metadata = {**header.metadata, DIGESTS_KEY: text}
    return raw.replace(before, after), replace(header, metadata=metadata)


def _is_the_one(path: Path, header_bytes: int, wanted: Header, files: Files) -> bool:
    """Whether a file has the header that was planned, whatever digests are in it by now."""
    found_at = files.identity_at(path)
    if found_at is None or found_at[2] != wanted.file_bytes:
        return False
    with files.reading(path) as fd:
        raw = bytearray(header_bytes)
        files.read_into(fd, memoryview(raw), 0, path)
    if raw[:LENGTH_BYTES] != (header_bytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little"):
        return False
    try:
        found = parse_header(bytes(raw[LENGTH_BYTES:]), found_at[2], str(path))
    except DamagedFileError:
        return False
    digests = {DIGESTS_KEY: wanted.metadata[DIGESTS_KEY]}
    return found.specs == wanted.specs and {**found.metadata, **digests} == wanted.metadata


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand.

    The header goes first, then the tensors in any order, each from its first byte to its
    last; a checksum of each is put into the header in the end. The file appears under its
    name only when :meth:`publish` finds it complete; until then it has the name
    with ``.partial`` after it. Leaving it as a context manager without publishing removes
    what was written. Not thread-safe.

    Attributes:
        path: the final name.
        header: where each tensor goes.
        digests: by name, xxh3-128 in hexadecimal of each tensor that is complete.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[Planned],
        files: Files,
        metadata: Mapping[str, str] | None = None,
        *,
        fill: bool = False,
    ) -> None:
        """Create the file and write its header.

        Raises:
            UnsupportedTensorError: a dtype that safetensors does not know.
            NoSpaceError: it has no room on its file system.
            StorageError: the file cannot be created or written.
        """
        planned = list(tensors)
        raw, header = _plan(planned, metadata, fill=fill)
        # Refused before it is begun, though another process may take the room all the same.
        files.check_space(path.parent, header.file_bytes)
        partial = partial_path(path)
        self._set_up(path, raw, header, files, files.create(partial))
        try:
            self._file.put(memoryview(raw), 0)
            files.set_size(self._file.fd, self.header.file_bytes, partial)
        except BaseException:
            self.abandon()
            raise

    @classmethod
    def resumed(
        cls,
        path: Path,
        tensors: Iterable[Planned],
        files: Files,
        metadata: Mapping[str, str] | None = None,
        *,
        finished: Mapping[str, str],
    ) -> ShardWriter:
        """Go on with a file that :meth:`suspend` left, or begin it.

        Args:
            path: as for the constructor.
            tensors: as for the constructor; the same as before.
            files: as for the constructor.
            metadata: as for the constructor; the same as before.
            finished: tensors whose bytes are in the file already, and their digests; may name
                others as well.
        """
        planned = list(tensors)
        raw, header = _plan(planned, metadata, fill=False)
        partial = partial_path(path)
        names = finished.keys() & header.specs.keys()
        if not names or not _is_the_one(partial, len(raw), header, files):
            if names:
                raise DamagedFileError(
                    f"{partial} is not the file that was begun, and {len(names)} tensors of it "
                    "are noted as written; remove its folder and begin anew"
                )
            files.remove(partial)
            return cls(path, planned, files, metadata)
        made = cls.__new__(cls)
        made._set_up(path, raw, header, files, files.open_for_writing(partial))
        made.digests.update({name: finished[name] for name in names})
        return made

    def _set_up(
        self,
        path: Path,
        raw: bytes,
        header: Header,
        files: Files,
        fd: int,
    ) -> None:
        self.path = path
        self.header = header
        self.digests: dict[str, str] = {}
        self._raw = raw
        self._begun: dict[str, tuple[int, xxhash.xxh3_128]] = {}
        self._files = files
        self._file = PartialFile(path, files, fd, header.file_bytes)

    @property
    def header_digest(self) -> str:
        """The xxh3-64 of the header's JSON as it is in the file, in hexadecimal."""
        return xxhash.xxh3_64_hexdigest(memoryview(self._raw)[LENGTH_BYTES:])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()

    def write_part(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor; the last ones make it complete.

        What is in the file agrees with its digest whoever changes ``data`` meanwhile.
        """
        spec = self.header.specs[name]
        done, digest = self._begun.get(name) or (0, xxhash.xxh3_128())
        assert done + len(data) <= spec.nbytes
        self._file.write(data, spec.offset + done, digest)
        self._count(name, done + len(data), digest)

    def _count(self, name: str, done: int, digest: xxhash.xxh3_128) -> None:
        if done < self.header.specs[name].nbytes:
            self._begun[name] = done, digest
            return
        self._begun.pop(name, None)
        self.digests[name] = digest.hexdigest()

    def write(self, name: str, data: memoryview) -> None:
        """Write all of a tensor's bytes."""
        spec = self.header.specs[name]
        if len(data) != spec.nbytes:
            raise StorageError(
                f"cannot write {name!r} to {self.path}: {len(data)} bytes were given "
                f"and {spec.nbytes} were planned"
            )
        self._begun.pop(name, None)
        self.write_part(name, data)

    def fill(self, name: str, fill_part: Callable[[memoryview, int], object]) -> None:
        """Write all of a tensor's bytes, which somebody puts into memory of ours, part after part.

        Args:
            name: the tensor.
            fill_part: puts them there; it is told how many bytes went before.
        """
        spec, digest = self.header.specs[name], xxhash.xxh3_128()
        self._file.fill(spec.nbytes, spec.offset, fill_part, digest)
        self._count(name, spec.nbytes, digest)

    def publish(self, *, durable: bool = True) -> Path:
        """Give the complete file its name; nothing may follow.

        Args:
            durable: wait until file and name are on the device, as a result must; scratch
                need not.

        Raises:
            StorageError: a planned tensor was never written, or the system refuses. Unless it
                has its name by then, the file is still there to :meth:`abandon` or to leave.
        """
        self._complete()
        return self._file.publish(durable=durable)

    def _complete(self) -> None:
        """Put the digests into the header."""
        for name, spec in self.header.specs.items():
            if not spec.nbytes:
                self.digests.setdefault(name, xxhash.xxh3_128_hexdigest(b""))
        names = [name for name in self.header.specs if needs_digest(name)]
        missing = sorted(name for name in names if name not in self.digests)
        if missing:
            raise StorageError(
                f"cannot publish {self.path}: {len(missing)} of its tensors were not "
                f"written, {missing[0]!r} among them"
            )
        digests = {name: self.digests[name] for name in names}
        self._file.end_direct()  # else the header waits for what is being written
        self._raw, self.header = _with_digests(self._raw, self.header, digests)
        self._file.put(memoryview(self._raw), 0)

    def sync(self) -> None:
        """Make what was written so far durable, and that the file is there.

        Raises:
            StorageError: it is not, or perhaps not; then neither is it at any later call, since
                the system may report a lost write only once. What an earlier call made durable
                stays so.
        """
        self._file.sync()

    def leave(self) -> None:
        """Close the file and leave it as it is, for :meth:`resumed`."""
        self._file.leave()

    def suspend(self) -> None:
        """Make what was written so far durable and leave it, for :meth:`resumed`."""
        self.sync()
        self.leave()

    def abandon(self) -> None:
        """Remove what was written, unless it was published."""
        self._file.abandon()
