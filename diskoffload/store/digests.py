"""Checksums of stored tensors: xxh3-128 (https://xxhash.com) of the bytes in the file.

They lie in the header's metadata, one for each tensor, so that a file tells by itself whether
it is what was written. A header is written before the digests are known: it is written once
more at the end, with the digests in the place of as many zeros. One more digest is of the
header itself, without the others, so that a header that was changed is noticed as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import NoReturn

import xxhash

from diskoffload.errors import DamagedFileError
from diskoffload.store.header import FILLER_PREFIX, METADATA_KEY, Header
from diskoffload.store.json_reader import JsonReader, brief

DIGESTS_KEY = "diskoffload.digests"
_DIGITS = 32
_BEGINNING = f'{{"{METADATA_KEY}": "'
_HEX = frozenset("0123456789abcdef")
_log = logging.getLogger(__name__)


def digests_to_come(names: Iterable[str]) -> str:
    """Give what stands in the metadata until the digests are known; as long as they will be."""
    return json.dumps(dict.fromkeys([METADATA_KEY, *names], "0" * _DIGITS))


def digests_as_text(header: Header, digests: Mapping[str, str]) -> str:
    """Give the digests of a file's tensors and of its header, for the metadata."""
    return json.dumps({METADATA_KEY: _digest_of_header(header), **digests})


def _digest_of_header(header: Header) -> str:
    """Digest what a header says, but for the digests; how it is spelled does not matter."""
    specs = sorted(
        (one.name, one.dtype_name, one.shape, one.offset) for one in header.specs.values()
    )
    rest = sorted((key, text) for key, text in header.metadata.items() if key != DIGESTS_KEY)
    said = json.dumps([specs, rest], separators=(",", ":")).encode("ascii")
    return xxhash.xxh3_128_hexdigest(said)


def needs_digest(name: str) -> bool:
    """Whether a tensor of that name has a checksum; what fills gaps has none."""
    return not name.startswith(FILLER_PREFIX)


def digests_of(header: Header, file: str, *, must_match: bool = False) -> dict[str, str]:
    """Read the digests of a file's tensors, in hexadecimal; empty for files of others.

    A file whose header is not the one that the digests were written with counts as another's,
    and a warning says so: most likely it was rewritten by a tool that kept the metadata.

    Args:
        header: of the file.
        file: its name, for messages.
        must_match: refuse a header that is not the one that was written, as
            :func:`check_header` does.

    Raises:
        DamagedFileError: they are not what we write.
    """
    found = _digests_in(header, file)
    expected = found.pop(METADATA_KEY, None)
    if must_match:
        _compare_header(header, file, expected)
    elif expected is not None and expected != _digest_of_header(header):
        _log.warning("%s; its tensors are not compared with them", _foreign_header(file))
        return {}
    absent = next((name for name in found if name not in header.specs), None)
    if absent is not None:
        raise DamagedFileError(
            f"{file}: its metadata {DIGESTS_KEY!r} has a digest for {brief(absent)}, which it "
            "does not hold; the file is damaged, write it again"
        )
    return found


def check_header(header: Header, file: str) -> None:
    """Compare a file's header with its digest; none is as good as right.

    Raises:
        DamagedFileError: it is not the one that was written.
    """
    _compare_header(header, file, _digests_in(header, file).get(METADATA_KEY))


def _compare_header(header: Header, file: str, expected: str | None) -> None:
    is_absent = DIGESTS_KEY not in header.metadata
    if is_absent and any(one.startswith(_BEGINNING) for one in header.metadata.values()):
        raise DamagedFileError(
            f"{file}: its checksums are not under their name, {DIGESTS_KEY!r}: the file is "
            "damaged; restore it from a copy"
        )
    if expected is not None and expected != _digest_of_header(header):
        raise DamagedFileError(
            f"{_foreign_header(file)}: the file is damaged, or another tool wrote it anew and kept "
            f"the metadata; restore it from a copy, or write it without {DIGESTS_KEY!r}"
        )


def _foreign_header(file: str) -> str:
    return f"{file}: its header is not the one that its checksums were written with"


def _digests_in(header: Header, file: str) -> dict[str, str]:
    text = header.metadata.get(DIGESTS_KEY)
    if text is None:
        return {}

    def refuse(reason: str) -> NoReturn:
        raise DamagedFileError(
            f"{file}: its metadata {DIGESTS_KEY!r} {reason}; the file is damaged, write it again"
        )

    def read(name: str) -> str:
        digest = reader.value(_DIGITS + 2)
        if not isinstance(digest, str) or len(digest) != _DIGITS or not _HEX.issuperset(digest):
            refuse(f"has no digest for {brief(name)}")
        return digest

    reader = JsonReader(text.encode("utf-8"), refuse)
    found = reader.table(read)
    reader.finish()
    return found


class Checking:
    """Compares the bytes of one tensor with its digest, as they come by."""

    def __init__(self, file: str, name: str, offset: int, expected: str | None) -> None:
        """Begin; without an expected digest nothing is compared."""
        self._place = (file, name, offset)
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
        if self._digest is not None:
            self.compare(self._digest.hexdigest())

    def compare(self, found: str) -> None:
        """Compare with a digest that was made elsewhere; raises as :meth:`finish`."""
        if self._expected is not None and found != self._expected:
            file, name, offset = self._place
            raise DamagedFileError(
                f"{file}, tensor {brief(name)} at offset {offset}: its bytes are not those that "
                f"were written (xxh3-128 {found}, written {self._expected}); restore the file "
                "from a copy, or make its content anew"
            )
