"""Checksums of stored tensors: xxh3-128 (https://xxhash.com) of the bytes in the file.

They lie in the header's metadata, one for each tensor, so that a file tells by itself whether
it is what was written. A header is written before the digests are known: it is written once
more at the end, with the digests in the place of as many zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import xxhash

from diskoffload.errors import DamagedFileError
from diskoffload.store.header import Header

DIGESTS_KEY = "diskoffload.digests"
_DIGITS = 32


def digests_to_come(names: Iterable[str]) -> str:
    """Give what stands in the metadata until the digests are known; as long as they will be."""
    return json.dumps(dict.fromkeys(names, "0" * _DIGITS))


def digests_as_text(digests: Mapping[str, bytes]) -> str:
    """Give the digests, by the tensors' names, for the metadata."""
    return json.dumps({name: digest.hex() for name, digest in digests.items()})


def digests_of(header: Header, file: str) -> dict[str, str]:
    """Read the digests of a file's tensors, in hexadecimal; empty for files of others.

    Raises:
        DamagedFileError: they are not what we write.
    """
    text = header.metadata.get(DIGESTS_KEY)
    if text is None:
        return {}
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not a table")
        for name, digest in found.items():
            if not isinstance(digest, str) or len(digest) != _DIGITS or name not in header.specs:
                raise ValueError(f"no digest for {name!r}")
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{file}: its metadata {DIGESTS_KEY!r} cannot be read ({error}); "
            "the file is damaged, write it again"
        ) from error
    return found


class Checking:
    """Compares the bytes of one tensor with its digest, as they come by."""

    def __init__(self, file: str, name: str, offset: int, expected: str | None) -> None:
        """Begin; without an expected digest nothing is compared."""
        self._where = f"{file}, tensor {name!r} at offset {offset}"
        self._expected = expected
        self._digest = None if expected is None else xxhash.xxh3_128()

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        if self._digest is not None:
            self._digest.update(data)

    def finish(self) -> None:
        """Compare.

        Raises:
            DamagedFileError: the bytes are not those that were written.
        """
        if self._digest is not None and self._digest.hexdigest() != self._expected:
            raise DamagedFileError(
                f"{self._where}: its bytes are not those that were written (xxh3-128 "
                f"{self._digest.hexdigest()}, written {self._expected}); restore the file from a "
                "copy, or make its content anew"
            )
