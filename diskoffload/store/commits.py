"""What an offload folder holds for good: what was committed last, and how that is written down.

An entry of the table says where one tensor of the model is. Its ``at`` is one of

- ``[shard, key]``, with ``strides`` where they are not row-major: in a file of the folder;
- ``{"source": name}``: in the source checkpoint, as the model's tensor of that name;
- ``{"tie": name}``: the very same tensor as another entry's;
- ``{"view": root, ...}``: a view of another entry's bytes (``shape``, ``strides``, ``offset``);
- ``null``: it is ``None`` or was deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diskoffload.errors import DamagedFileError
from diskoffload.store.journal import Journal, Record

_VERSION = 1
# What is written whole when it has changed; the tables are written entry by entry.
_WHOLE = ("note", "source", "born")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Committed:
    """A state that was committed. Not to be changed.

    Attributes:
        number: how many commits there were, this one included; 0 before the first.
        seconds: when, in seconds since 1970.
        entries: by a tensor's full name, where it is; only what the source does not say.
        shards: by file name, the length in bytes and the header's digest.
        note_text: whatever was given with the commit, as JSON.
        source: the checkpoint that the model was opened from, and its fingerprint.
        born: by full name, dtype and shape when the model was offloaded.
    """

    number: int = 0
    seconds: float = 0.0
    entries: Mapping[str, Entry] = field(default_factory=dict)
    shards: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    note_text: str = "null"
    source: Mapping[str, Any] | None = None
    born: Mapping[str, tuple[str, tuple[int, ...]]] | None = None

    @property
    def note(self) -> Any:
        """Whatever was given with the commit; each time a copy of its own."""
        return json.loads(self.note_text)


class Commits:
    """The commits of one folder. Not thread-safe: who commits holds the folder's lock."""

    def __init__(self, journal: Journal) -> None:
        """Read what was committed last.

        Raises:
            DamagedFileError: the journal is damaged, or of a later version.
        """
        self._journal = journal
        self._in_doubt = False
        self.last = _replayed(journal.read(), str(journal.path))

    def make_durable(self) -> None:
        """Have on the device what was read; see :meth:`Journal.make_durable`."""
        self._journal.make_durable()

    def write(self, wanted: Committed) -> Committed:
        """Commit a state: what differs from the last one is appended, durably.

        Args:
            wanted: the state; its number and time are set here.

        Raises:
            StorageError: it could not be written; the last commit stays what it was.
        """
        made = replace(wanted, number=self.last.number + 1, seconds=time.time())
        # What an interrupted call has written is no state to tell a difference from.
        whole = self._in_doubt or self._journal.must_be_rewritten
        self._in_doubt = True
        if whole:
            self._journal.rewrite(_difference(Committed(), made))
        else:
            self._journal.append(_difference(self.last, made))
        self.last = made
        self._in_doubt = False
        return made


def _difference(before: Committed, after: Committed) -> Record:
    record: Record = {"version": _VERSION, "commit": after.number, "seconds": after.seconds}
    for name in ("entries", "shards"):
        old, new = getattr(before, name), getattr(after, name)
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        gone = [key for key in old if key not in new]
        record.update({name: changed} if changed else {})
        record.update({f"no_{name}": gone} if gone else {})
    for name in _WHOLE:
        if getattr(before, name) != getattr(after, name):
            record[name] = getattr(after, name)
    return record


def _replayed(records: list[Record], where: str) -> Committed:
    """Give the state that the last of some records leaves."""
    state: dict[str, Any] = {"entries": {}, "shards": {}}
    for record in records:
        if record.get("version") != _VERSION:
            raise DamagedFileError(
                f"{where} is of version {record.get('version')!r} and this diskoffload reads "
                f"version {_VERSION}: use the one that wrote it"
            )
        try:
            state.update(number=int(record["commit"]), seconds=float(record["seconds"]))
            for name in ("entries", "shards"):
                state[name].update(record.get(name, {}))
                for key in record.get(f"no_{name}", ()):
                    del state[name][key]
            state.update({name: record[name] for name in _WHOLE if name in record})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _foreign(where, error) from error
    try:
        shards = {name: (int(size), str(text)) for name, (size, text) in state["shards"].items()}
        born = state.get("born")
        if born is not None:
            born = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in born.items()}
        if not all(
            isinstance(entry, dict) and "at" in entry for entry in state["entries"].values()
        ):
            raise ValueError("an entry says not where its tensor is")
        note_text = json.dumps(state.pop("note", None))
        return Committed(**{**state, "shards": shards, "born": born, "note_text": note_text})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _foreign(where, error) from error


def _foreign(where: str, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{where}: a record cannot be understood ({error!r}) though its checksum is right; "
        "it was not written by this diskoffload"
    )
