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
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diskoffload.errors import DamagedFileError, StorageError, listed
from diskoffload.store.journal import Journal, Record
from diskoffload.store.lock import is_shard_name, leftovers

_VERSION = 1
# What is written whole when it has changed; the tables are written entry by entry.
_WHOLE = ("note", "source", "born")
_log = logging.getLogger(__name__)
_KINDS = frozenset(("parameter", "buffer", "unsaved buffer", "gone", "root"))
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
        born: by full name, dtype and shape when the model was offloaded; no dtype of what was in
            a plain module.
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
            DamagedFileError: the journal is damaged, of a later version, or lost.
        """
        self._journal = journal
        self._in_doubt = False
        self.last = _replayed(journal.read(), str(journal.path))
        self._is_marked = journal.marker.is_there()
        if self._is_marked and not self.last.number:
            self._refuse_if_lost()

    def _refuse_if_lost(self) -> None:
        """Tell a folder whose journal was lost from one in which nothing was ever committed."""
        path = self._journal.path
        files = leftovers(path.parent)
        if files:
            raise DamagedFileError(
                f"{path.parent} holds commits ({self._journal.marker.path.name} says so), and "
                f"{path.name} is {'empty' if path.exists() else 'gone'}, which says where in "
                f"{len(files)} files they are: {listed([one.name for one in files])}. Nothing was "
                "changed; put that file back, from wherever it was moved to or from a copy, or "
                "remove the folder to begin anew"
            )

    def make_durable(self) -> None:
        """Have on the device what was read, see :meth:`Journal.make_durable`, and say it lasts."""
        self._journal.make_durable()
        self._mark()

    def _mark(self) -> None:
        """Have a later loss of the journal noticed; only once what it says is durable."""
        if self._is_marked or not self.last.number:
            return
        try:
            self._journal.marker.leave()
            self._is_marked = True
        except StorageError as error:  # the commit holds without it; the next one tries again
            _log.warning("should the journal be lost, nobody will notice: %s", str(error))

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
        self._mark()
        return made


def _difference(before: Committed, after: Committed) -> Record:
    record: Record = {"version": _VERSION, "commit": after.number, "seconds": after.seconds}
    for name in ("entries", "shards"):
        old, new = getattr(before, name), getattr(after, name)
        changed = {
            key: value
            for key, value in new.items()
            if (known := old.get(key)) is not value and known != value
        }
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
        shards = {_shard_name(name): _shard(*said) for name, said in state["shards"].items()}
        entries = {_text(name): _entry(said, shards) for name, said in state["entries"].items()}
        born = state.get("born")
        if born is not None:
            born = {
                _text(name): (_text(dtype), _sizes(shape)) for name, (dtype, shape) in born.items()
            }
        source = state.get("source")
        if source is not None:
            _text(source["path"])
            _dtype(source["dtype"], may_lack=True)
            source["files"].items()
        note_text = json.dumps(state.pop("note", None))
        checked = {"shards": shards, "entries": entries, "born": born, "note_text": note_text}
        return Committed(**{**state, **checked})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _foreign(where, error) from error


def _entry(said: Any, shards: Mapping[str, object]) -> Entry:
    """Check what a record says of one tensor; raise anything if it cannot be."""
    if said["is"] not in _KINDS:
        raise ValueError(f"a tensor is {said['is']!r}")
    if said["is"] == "parameter" and not isinstance(said["grad"], bool):
        raise ValueError("a parameter neither takes part in training nor does not")
    at = said["at"]
    if isinstance(at, list):
        file, key = at
        if file not in shards:
            raise ValueError(f"a tensor is in {file!r}, which was not committed")
        _text(key)
        _sizes(said.get("strides", []))
    elif isinstance(at, dict):
        (word,) = at.keys() & {"source", "tie", "view"}
        _text(at[word])
        if word == "view":
            _dtype(at["dtype"])
            _sizes([*at["shape"], *at["strides"], at["offset_bytes"]])
            if len(at["shape"]) != len(at["strides"]):
                raise ValueError("a view has more dimensions than strides, or fewer")
    elif at is not None:
        raise ValueError(f"a tensor is at {at!r}")
    return dict(said)


def _shard_name(name: Any) -> str:
    if not is_shard_name(_text(name)):  # it is opened, and removed one day
        raise ValueError(f"{name!r} is no file of an offload folder")
    return str(name)


def _shard(size: Any, digest: Any) -> tuple[int, str]:
    return _sizes([size])[0], _text(digest)


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise TypeError(f"{said!r} is no text")
    return said


def _sizes(said: Any) -> tuple[int, ...]:
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in said):  # a bool is an int
        raise ValueError(f"{said!r} are no sizes")
    return tuple(said)


def _dtype(said: Any, *, may_lack: bool = False) -> None:
    if not (said is None and may_lack) and not isinstance(vars(torch).get(said), torch.dtype):
        raise ValueError(f"{said!r} is no dtype")


def _foreign(where: str, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{where}: a record cannot be understood ({error!r}) though its checksum is right; "
        "it was not written by this diskoffload"
    )
