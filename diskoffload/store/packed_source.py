"""What a packed file remembers of the one it was made from, so that this can be made again.

It lies in the packed file's metadata: the other's header, byte for byte, and a checksum of each
value in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from diskoffload.errors import DamagedFileError
from diskoffload.store.header import LENGTH_BYTES, Header, parse_header
from diskoffload.store.json_reader import JsonReader, brief

SOURCE_KEY = "diskoffload.source"
_VERSION = 1
_MOST_TEXT_BYTES = 64 << 20
_MOST_VALUE_BYTES = 64
_DIGITS = 32


@dataclass(frozen=True)
class PackedSource:
    """What a packed file was made from.

    Attributes:
        head: the file's bytes up to its first tensor's.
        header: what they say.
        digests: by name, xxh3-128 of each tensor's bytes, in hexadecimal.
    """

    head: bytes
    header: Header
    digests: Mapping[str, str]


def source_as_text(head: bytes, file_bytes: int, digests: Mapping[str, str]) -> str:
    """Describe a file for the metadata of the packed one.

    Args:
        head: the file's bytes up to its first tensor's.
        file_bytes: its length.
        digests: by name, xxh3-128 of each tensor's bytes, in hexadecimal.
    """
    header = head[LENGTH_BYTES:].decode("utf-8")
    said = {"version": _VERSION, "bytes": file_bytes, "header": header, "digests": dict(digests)}
    return json.dumps(said)


def source_of(packed: Header, file: str) -> PackedSource | None:
    """Tell what a packed file was made from; ``None`` if it does not say.

    Args:
        packed: the packed file's header; that it is the one that was written was checked.
        file: its name, for messages.

    Raises:
        DamagedFileError: what it says cannot be, or this version of ours does not know it.
    """
    text = packed.metadata.get(SOURCE_KEY)
    if text is None:
        return None

    def refuse(reason: str) -> NoReturn:
        raise DamagedFileError(
            f"{file}: its metadata {SOURCE_KEY!r} {reason}; the file is damaged, restore it from a "
            "copy or pack its source again"
        )

    def digest(name: str) -> str:
        value = reader.value(_MOST_VALUE_BYTES)
        if not isinstance(value, str) or len(value) != _DIGITS:
            refuse(f"has no digest for {brief(name)}")
        return value

    def part(key: str) -> object:
        if key == "digests" and reader.at_table():
            return reader.table(digest)
        return reader.value(_MOST_TEXT_BYTES if key == "header" else _MOST_VALUE_BYTES)

    reader = JsonReader(text.encode("utf-8"), refuse)
    found = reader.table(part)
    reader.finish()
    version, file_bytes, header, digests = map(found.get, ("version", "bytes", "header", "digests"))
    if type(version) is int and version > _VERSION:
        raise DamagedFileError(
            f"{file} was packed by a newer version (its source is described in version {version}, "
            f"and up to {_VERSION} is known); a newer diskoffload can unpack it"
        )
    if not isinstance(header, str) or not isinstance(digests, dict) or type(file_bytes) is not int:
        refuse("lacks its source's length, header or digests")
    raw = header.encode("utf-8")
    if type(version) is not int or version != _VERSION or not 0 <= file_bytes < 1 << 63:
        refuse(f"says the version {brief(version)} and {brief(file_bytes)} bytes")
    described = parse_header(raw, file_bytes, f"what {file} was packed from")
    if digests.keys() != described.specs.keys():
        refuse("has digests of other tensors than its source has")
    return PackedSource(len(raw).to_bytes(LENGTH_BYTES, "little") + raw, described, digests)
