"""A power cut at any moment: what was not synced is lost in part, and no commit with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nets import WAYS
from power import EXTREMES, Disk, lay_out
from recording import Recording, using
from session import Session
from witness import Allowed, Witness

from diskoffload.errors import StorageError


def recorded(
    root: Path, way: str, seed: int, checkpoint: Path, *, at: int = -1
) -> tuple[Recording, Witness]:
    """Record a session; one operation of it fails, and the session just goes on."""
    files, witness = Recording(root, at), Witness()

    def report(what: str, *state: Any) -> None:
        witness.report(what, *state)
        files.mark(what)

    def do(what: str, action: Callable[[], Any]) -> Any:
        for _ in range(2):
            try:
                return action()
            except StorageError:
                assert files.failed
                if what == "commit":
                    return None  # the next one has to be as good
        raise AssertionError(f"{what} failed again when the fault was gone")

    with using(files):
        Session(way, seed, root / "offload", checkpoint, report, do).run()
    return files, witness


def moments(files: Recording) -> Iterator[tuple[int, Disk, Allowed]]:
    """Give the disk after each operation, and what may be found there."""
    disk = Disk(files.before, files.numbered())
    allowed: Allowed = frozenset({None})
    begun = -1
    for number, op in enumerate(files.ops):
        disk.apply(op)
        if op.kind == "mark":
            begun += op.path == "begins"
            allowed = frozenset({begun}) | (allowed if op.path == "begins" else frozenset())
        yield number, disk, allowed


class Cuts:
    """Cuts the power, and looks at what is left; the same twice only once."""

    def __init__(self, way: str, root: Path, witness: Witness) -> None:
        self.count = 0
        self._way, self._root, self._witness = way, root, witness
        self._seen: set[object] = set()

    def cut(self, disk: Disk, allowed: Allowed, choice: str, when: str) -> None:
        left = disk.left(choice)
        key = (frozenset(left.items()), allowed)
        if key in self._seen:
            return
        self._seen.add(key)
        self.count += 1
        place = self._root.parent / "cut"
        place.mkdir()
        lay_out(left, self._root, place)
        try:
            self._witness.check(self._way, place / "offload", allowed)
        except Exception as error:
            raise AssertionError(f"after a power cut {when} that left {choice}") from error
        finally:
            shutil.rmtree(place)


def check_session(
    root: Path, way: str, seed: int, checkpoint: Path, choices: tuple[str, ...], more: int = 0
) -> None:
    (root / "offload").mkdir()
    files, witness = recorded(root, way, seed, checkpoint)
    kinds = {op.kind for op in files.ops}
    assert {"create", "write", "sync", "sync_folder", "rename", "remove"} <= kinds
    assert sum(op.target.endswith(".journal") for op in files.ops) > 1  # it was compacted
    cuts = Cuts(way, root, witness)
    for number, disk, allowed in moments(files):
        for choice in [*choices, *(f"{number}/{one}" for one in range(more))]:
            cuts.cut(disk, allowed, choice, f"after operation {number}, {files.ops[number]}")
    assert cuts.count > len(files.ops) // 2


@pytest.mark.parametrize(
    ("way", "choices", "more"), [("built", EXTREMES, 1), ("opened", ("nothing", "everything"), 0)]
)
def test_a_power_cut_anywhere_leaves_the_last_commit(
    way: str, choices: tuple[str, ...], more: int, root: Path, checkpoint: Path
) -> None:
    check_session(root, way, 1, checkpoint, choices, more)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_power_cuts(way: str, seed: int, root: Path, checkpoint: Path) -> None:
    check_session(root, way, seed, checkpoint, EXTREMES, more=8)


def test_a_folder_that_the_commit_made_is_there_afterwards(root: Path, checkpoint: Path) -> None:
    files, witness = recorded(root, "built", 1, checkpoint)
    for number, disk, allowed in moments(files):
        if None not in allowed:
            Cuts("built", root, witness).cut(disk, allowed, "nothing", f"after {number}")
            return


# ---------------------------------------------------------------------- a fault before


_SYNCS = ("sync", "sync_folder", "rename", "set_size")


def check_faults(
    root: Path, way: str, seed: int, checkpoint: Path, *, every: int, choices: int
) -> None:
    """Have a sync or a name's change fail, go on, and cut the power at moments after that."""
    (root / "offload").mkdir()
    files, _ = recorded(root, way, seed, checkpoint)
    faults = [number for number, (what, _) in enumerate(files.watched) if what in _SYNCS]
    assert len(faults) > 20
    for at in faults[::every]:
        shutil.rmtree(root / "offload")
        (root / "offload").mkdir()
        files, witness = recorded(root, way, seed, checkpoint, at=at)
        cuts = Cuts(way, root, witness)
        begin = next((n for n, op in enumerate(files.ops) if op.kind == "failed_sync"), at // 2)
        for number, disk, allowed in moments(files):
            for choice in range(choices if number >= begin else 0):
                when = f"after operation {number}, {files.ops[number]}; {files.failed} failed"
                if (number + choice) % every == 0:
                    cuts.cut(disk, allowed, f"{at}/{number}/{choice}", when)


def test_a_power_cut_after_a_fault_leaves_a_whole_commit(root: Path, checkpoint: Path) -> None:
    check_faults(root, "built", 1, checkpoint, every=7, choices=1)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_many_power_cuts_after_faults(way: str, root: Path, checkpoint: Path) -> None:
    check_faults(root, way, 2, checkpoint, every=2, choices=2)
