"""JSON from anyone, read piece by piece, so that memory and time stay in proportion to it.

``json.loads`` of a hostile text takes up to 40 bytes of memory for each of its bytes
(``[[[],[]],...``), all at once. Here a large table is read entry by entry: the caller keeps
what it makes of each, and one that is longer than the caller allows is refused. Of short ones,
as many are decoded at a stroke as lie in a piece of the text; one by one takes three times as
long.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# Enough for hundreds of tensors' entries; a longer value has the piece grow.
_PIECE_BYTES = 1 << 16
_GROWTH = 8
_MAX_KEY_BYTES = 1 << 20
# A number cut after its first digit, as in "1e+", may end this far before its piece does.
_CUT_CHARACTERS = 4
# Python's own bound (sys.set_int_max_str_digits), which can be lifted and which 3.10.6 lacks.
_MAX_DIGITS = 4300
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_TO_THE_END = re.compile(rb"[ \t\n\r]*\Z")
_NOT_DECODED = object()
_brief = reprlib.Repr()
_brief.maxstring = 160


def brief(said: object) -> str:
    """Show what a file says in a message: in part, however long or deep it is."""
    return _brief.repr(said)


class JsonReader:
    """Reads one JSON text from its beginning to its end; for one thread.

    A key that a table has twice, ``NaN``, ``Infinity`` and numbers of more than 4,300 digits
    are refused wherever they are.

    Args:
        raw: the text in UTF-8.
        refuse: raises the caller's error; it is given the rest of a sentence that begins
            with what the text is, like ``"is not JSON (...)"``.
    """

    def __init__(self, raw: bytes | bytearray, refuse: Callable[[str], NoReturn]) -> None:
        self._raw = raw
        self._refuse = refuse
        self._decoder = self._decoder_with(short_int)
        self._quick_decoder = self._decoder_with(int if _int_is_short() else short_int)
        self._decoded: Any = _NOT_DECODED  # what comes next, if that is done already
        self._text = ""  # a piece of the text, decoded,
        self._at = 0  # how many characters of it are done,
        self._begin = 0  # and which bytes it is
        self._end = 0
        self._asked_bytes = 0  # which may be more, for a character is not taken apart
        self._is_last = False  # whether it goes to the end of the text;
        self._sure = 0  # a value that ends before this character ends there
        self._is_plain = True  # and no attempt to decode its entries at a stroke has failed
        self._refill(_PIECE_BYTES)

    def _decoder_with(self, parse_int: Callable[[str], int]) -> json.JSONDecoder:
        return json.JSONDecoder(
            object_pairs_hook=self._unique, parse_constant=self._no_number, parse_int=parse_int
        )

    def table(self, read: Callable[[str], T]) -> dict[str, T]:
        """Read a table; ``read`` is given each key and reads its value from this reader."""
        made: dict[str, T] = {}
        if self._decoded is not _NOT_DECODED:
            self._read_each(self._take_decoded(), read, made)
            return made
        self._expect("{")
        if self._peek() == "}":
            self._at += 1
            return made
        while True:
            self._read_each(self._entries_ahead(), read, made)
            if self._peek() != '"':
                self._refuse_json("expecting a key", self._at)
            key = self._decode(_MAX_KEY_BYTES)
            if key in made:
                self._refuse_twice(key)
            self._expect(":")
            made[key] = read(key)
            if self._peek() == "}":
                self._at += 1
                return made
            self._expect(",")

    def at_table(self) -> bool:
        """Tell whether a table comes next."""
        if self._decoded is not _NOT_DECODED:
            return isinstance(self._decoded, dict)
        return self._peek() == "{"

    def value(self, most_bytes: int) -> Any:
        """Read a value whole, which may take so many bytes of the text (at least 64 KiB)."""
        if self._decoded is not _NOT_DECODED:
            return self._take_decoded()
        self._peek()
        return self._decode(most_bytes)

    def _take_decoded(self) -> Any:
        value, self._decoded = self._decoded, _NOT_DECODED
        return value

    def _read_each(
        self, entries: dict[str, Any], read: Callable[[str], T], made: dict[str, T]
    ) -> None:
        for key, value in entries.items():
            if key in made:
                self._refuse_twice(key)
            self._decoded = value
            made[key] = read(key)
        self._decoded = _NOT_DECODED

    def _entries_ahead(self) -> dict[str, Any]:
        """Decode the entries of a table that lie whole in this piece, but for the last, and pass.

        Empty if the comma after them is not plain to see, or anything is wrong with them: who
        reads entries one by one finds out what, and where.
        """
        if not self._is_plain:
            return {}
        stop = self._at + _PIECE_BYTES  # the piece may have grown for one long value
        last = self._text.rfind("},", self._at, stop)
        if last < 0:
            last = self._text.rfind('",', self._at, stop)
        text = "{" + self._text[self._at : last + 1] + "}"
        try:
            entries, end = self._quick_decoder.raw_decode(text)
        except (ValueError, RecursionError):
            end = 0
        if last < 0 or end < len(text):  # or the table ends before
            self._is_plain = False
            return {}
        self._at = last + 2
        found: dict[str, Any] = entries
        return found

    def _decode(self, most_bytes: int) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_last:
                    self._refuse_json(error.msg, error.pos)
            except RecursionError:
                self._refuse("is nested too deeply")
            except _TooManyDigitsError:
                self._refuse(f"holds a number of more than {_MAX_DIGITS} digits")
            else:
                if end < self._sure:
                    self._at = end
                    return value
            if self._at > 0:  # only a piece that begins with the value shows how long it is
                self._refill(_PIECE_BYTES)
            elif self._asked_bytes < most_bytes:
                self._refill(min(self._asked_bytes * _GROWTH, most_bytes))
            else:
                self._refuse_json(f"or has there a value of more than {most_bytes} bytes", 0)

    def finish(self) -> None:
        """Check that nothing but space follows."""
        self._refill(_PIECE_BYTES)
        if _SPACE_TO_THE_END.match(self._raw, self._begin) is None:
            self._refuse_json("something follows the table", 0)

    def _refill(self, nbytes: int) -> None:
        """Take the next piece, beginning with what is not done."""
        self._begin += len(self._text[: self._at].encode("utf-8"))
        self._asked_bytes = nbytes
        self._end = min(self._begin + nbytes, len(self._raw))
        # Back to where a character begins; what is not UTF-8 fails below.
        for _ in range(3):
            if self._end < len(self._raw) and self._raw[self._end] & 0xC0 == 0x80:
                self._end -= 1
        self._at = 0
        self._is_plain = True
        try:
            self._text = self._raw[self._begin : self._end].decode("utf-8")
        except UnicodeDecodeError as error:
            at_byte = self._begin + error.start
            self._refuse(f"is not JSON (at byte {at_byte}: not UTF-8, {error.reason})")
        self._is_last = self._end == len(self._raw)
        self._sure = len(self._text) + (1 if self._is_last else -_CUT_CHARACTERS)

    def _peek(self) -> str:
        """Give the next character that is no space, unread; an empty one at the end."""
        while True:
            found = self._text[self._at : self._at + 1]
            if found > " ":
                return found
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # it matches nothing, too
            self._at = space.end()
            if self._at < len(self._text) or self._is_last:
                return self._text[self._at : self._at + 1]
            self._refill(_PIECE_BYTES)

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            self._refuse_json(f"expecting {character!r}", self._at)
        self._at += 1

    def _refuse_json(self, fault: str, at: int) -> NoReturn:
        at_byte = self._begin + len(self._text[:at].encode("utf-8"))
        self._refuse(f"is not JSON (at byte {at_byte}: {fault})")

    def _refuse_twice(self, key: str) -> NoReturn:
        self._refuse(f"has the key {brief(key)} twice")

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._refuse_twice(key)
                seen.add(key)
        return made

    def _no_number(self, word: str) -> NoReturn:
        self._refuse(f"holds {word}, which is not JSON")


class _TooManyDigitsError(ValueError):
    """A number so long that only reading it would take minutes."""


def _int_is_short() -> bool:
    """Whether Python's own conversion refuses as many digits; 3.10.6 does not, or on request."""
    bound = getattr(sys, "get_int_max_str_digits", None)
    return bound is not None and 0 < bound() <= _MAX_DIGITS


def short_int(digits: str) -> int:
    """Convert the digits of a JSON number, unless there are thousands (``ValueError``)."""
    if len(digits) > _MAX_DIGITS:
        raise _TooManyDigitsError(f"a number of {len(digits)} digits")
    return int(digits)
