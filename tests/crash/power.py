"""What a power cut leaves: any of what was not synced, in any combination.

The rules are stricter than any one file system's. A file's bytes are safe once it was synced,
all others are there or not, sector by sector, and its length is any that it has had since. A
name is safe once its folder was synced; every create, rename and remove since was done or not,
whatever became of the others. After a sync that failed, what it should have made safe is never
safe again: the kernel may have dropped the pages and says so only once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recording import Op

_SECTOR_BYTES = 512
EXTREMES = ("nothing", "everything", "only data", "only names")
"""Choices of what is left that are always worth a look; any other text is a seed."""


@dataclass
class _File:
    safe: bytearray = field(default_factory=bytearray)
    pending: list[Op] = field(default_factory=list)
    doubtful: list[Op] = field(default_factory=list)

    def sync(self) -> None:
        for op in self.pending:
            _apply(self.safe, op)
        self.pending.clear()

    def fail(self) -> None:
        self.doubtful += self.pending
        self.pending.clear()

    def left(self, choice: _Choice) -> bytes:
        found = bytearray(self.safe)
        unsafe = [*self.doubtful, *self.pending]
        sizes = [len(found)]
        for op in unsafe:
            sizes.append(op.offset if op.kind == "set_size" else op.offset + len(op.data))
        for op in unsafe:
            if op.kind == "set_size":
                if choice.data():
                    _apply(found, op)
                continue
            for part in _sectors(op):
                if choice.data():
                    _apply(found, part)
        size = choice.size([max(len(found), *sizes), len(found), *sizes])
        del found[size:]
        return bytes(found) + bytes(size - len(found))


def _apply(content: bytearray, op: Op) -> None:
    if op.kind == "set_size":
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
        return
    content.extend(bytes(max(0, op.offset - len(content))))
    content[op.offset : op.offset + len(op.data)] = op.data


def _sectors(op: Op) -> Iterator[Op]:
    start, stop = op.offset, op.offset + len(op.data)
    while start < stop:
        end = min(stop, (start // _SECTOR_BYTES + 1) * _SECTOR_BYTES)
        data = op.data[start - op.offset : end - op.offset]
        yield Op("write", op.path, op.file, offset=start, data=data)
        start = end


class _Choice:
    """Chooses what of the unsafe is left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rng = random.Random(name)
        self._chances = [self._rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)) for _ in range(2)]

    def data(self) -> bool:
        if self._name in EXTREMES:
            return self._name in ("everything", "only data")
        return self._rng.random() < self._chances[0]

    def name(self) -> bool:
        if self._name in EXTREMES:
            return self._name in ("everything", "only names")
        return self._rng.random() < self._chances[1]

    def size(self, sizes: list[int]) -> int:
        """Choose a length; the first one is the longest that there was, the second as written."""
        if self._name in EXTREMES:
            # A length without its data is what delayed allocation leaves.
            return sizes[0] if self._name == "only names" else sizes[1]
        if self._rng.random() < 0.5:
            return sizes[1]
        return self._rng.randint(min(sizes), max(sizes))


class Disk:
    """A disk to which recorded operations are done, up to a power cut."""

    def __init__(self, before: dict[str, bytes | None], numbers: dict[str, int]) -> None:
        """Begin with what was there, all of it safe; a folder has ``None`` for content."""
        self._files = {
            numbers[path]: _File(bytearray(data))
            for path, data in before.items()
            if data is not None
        }
        self._names = dict(numbers)
        self._pending: list[Op] = []

    def apply(self, op: Op) -> None:
        """Do one operation."""
        if op.kind == "create":
            self._files[op.file] = _File()
        if op.kind in ("write", "set_size"):
            self._files[op.file].pending.append(op)
        elif op.kind == "sync":
            self._files[op.file].sync()
        elif op.kind == "failed_sync":
            self._files[op.file].fail()
        elif op.kind == "sync_folder":
            mine = [one for one in self._pending if Path(one.path).parent == Path(op.path)]
            _rename_all(self._names, mine)
            self._pending = [one for one in self._pending if one not in mine]
        elif op.kind != "mark":
            self._pending.append(op)

    def left(self, choice: str) -> dict[str, bytes | None]:
        """Give what a power cut leaves, by path; ``None`` for a folder."""
        chooser = _Choice(choice)
        names = dict(self._names)
        _rename_all(names, [op for op in self._pending if chooser.name()])
        content = {number: file.left(chooser) for number, file in self._files.items()}
        return {path: content.get(number) for path, number in sorted(names.items())}


def _rename_all(names: dict[str, int], ops: Iterable[Op]) -> None:
    for op in ops:
        if op.kind in ("create", "make_folder"):
            names[op.path] = op.file
        elif op.kind == "rename":
            names[op.target] = op.file
            if names.get(op.path) == op.file:
                del names[op.path]
        elif op.kind == "remove":
            if names.get(op.path) == op.file:
                del names[op.path]
        else:
            assert op.kind == "exchange"
            one, two = names.get(op.path), names.get(op.target)
            for path, number in ((op.path, two), (op.target, one)):
                if number is not None:
                    names[path] = number


def lay_out(left: dict[str, bytes | None], root: Path, place: Path) -> None:
    """Write what is left beneath ``root`` to another place; what has no folder is lost."""
    for path, data in left.items():
        target = place / Path(path).relative_to(root)
        if not target.parent.is_dir():
            continue
        if data is None:
            target.mkdir()
        else:
            target.write_bytes(data)
