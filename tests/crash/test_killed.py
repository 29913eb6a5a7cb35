"""SIGKILL at every file operation, and at random moments, of a process that works and commits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nets import WAYS
from nursery import Diary, Nursery
from witness import Witness

from diskoffload.store.folder import Folder

WHENS = ("before", "amid", "after")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


class Lives:
    """Lets processes work in one folder after another, and kills them."""

    def __init__(self, nursery: Nursery, root: Path, checkpoint: Path, way: str) -> None:
        self.nursery, self.root, self.way = nursery, root, way
        self._checkpoint = checkpoint

    def begin(self, seed: int, at: int = -1, when: str = "before", **more: object) -> None:
        """Begin with an empty folder, or with what there is if it is to be gone on with."""
        if not more:
            shutil.rmtree(self.root)
            (self.root / "offload").mkdir(parents=True)
        self.diary = self.root / "diary"
        shutil.rmtree(self.diary, ignore_errors=True)
        self.diary.mkdir()
        self.pid = self.nursery.begin(
            way=self.way,
            seed=seed,
            place=self.root / "offload",
            diary=self.diary,
            checkpoint=self._checkpoint,
            at=at,
            when=when,
            **more,
        )

    def end(self, witness: Witness) -> list[str]:
        """Wait, and let the witness read the diary."""
        code = self.nursery.end()
        words = Diary(self.diary).read(witness)
        assert code == -signal.SIGKILL or (code == 0 and words)
        return words

    def operations(self, seed: int) -> int:
        """Count the operations of a whole life."""
        witness = Witness()
        self.begin(seed)
        (word,) = self.end(witness)
        assert self.check(witness) == len(witness.states) - 1
        return int(word.split()[1])

    def check(self, witness: Witness) -> int | None:
        found = witness.check(self.way, self.root / "offload")
        if found is None:
            # What was never committed goes when somebody opens the folder.
            Folder(self.root / "offload")
            left = {path.name for path in (self.root / "offload").iterdir()}
            assert left <= {"diskoffload.journal"}
        return found


def check_killed_at(lives: Lives, seed: int, at: int, when: str) -> None:
    """Kill a process, and one that goes on from what is left, before anyone has cleared up."""
    witness = Witness()
    lives.begin(seed, at, when)
    assert lives.end(witness) == []
    offload = lives.root / "offload"
    shutil.copytree(offload, lives.root / "copy")
    found = lives.check(witness)
    shutil.rmtree(offload)
    (lives.root / "copy").rename(offload)
    if found is None:
        return
    plain = lives.root / "plain"
    (lives.diary / f"state-{found}").rename(plain)
    second = Witness()
    second.states, second.allowed = [witness.states[found]], frozenset({0})
    lives.begin(seed, at % 40, WHENS[at % 3], go_on_from=plain)
    # It may end before it is killed.
    lives.end(second)
    lives.check(second)


@pytest.mark.parametrize(("way", "seed"), [("built", 1), ("opened", 2)])
def test_killed_at_operations(
    way: str, seed: int, nursery: Nursery, root: Path, checkpoint: Path
) -> None:
    lives = Lives(nursery, root, checkpoint, way)
    operations = lives.operations(seed)
    assert operations > 60
    # Each at another place than the other way's, and than the next one's "when".
    for number, at in enumerate(range(seed, operations, 19)):
        check_killed_at(lives, seed, at, WHENS[number % 3])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_every_operation(
    way: str, nursery: Nursery, root: Path, checkpoint: Path
) -> None:
    lives = Lives(nursery, root, checkpoint, way)
    for at in range(lives.operations(3)):
        for when in WHENS:
            check_killed_at(lives, 3, at, when)


def check_killed_any_time(lives: Lives, seed: int, seconds: float) -> bool:
    witness = Witness()
    lives.begin(seed)
    time.sleep(random.Random(seed).uniform(0, seconds))
    os.kill(lives.pid, signal.SIGKILL)
    was_killed = lives.end(witness) == []
    lives.check(witness)
    return was_killed


def seconds_of_a_life(lives: Lives) -> float:
    lives.operations(0)
    began = time.monotonic()
    lives.operations(0)
    return time.monotonic() - began


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments(way: str, nursery: Nursery, root: Path, checkpoint: Path) -> None:
    lives = Lives(nursery, root, checkpoint, way)
    seconds = seconds_of_a_life(lives)
    killed = sum(check_killed_any_time(lives, seed, seconds) for seed in range(200))
    assert killed > 50  # as many as the machine is quiet


def test_killed_at_a_few_random_moments(nursery: Nursery, root: Path, checkpoint: Path) -> None:
    lives = Lives(nursery, root, checkpoint, "mixed")
    seconds = seconds_of_a_life(lives)
    assert any([check_killed_any_time(lives, seed, seconds) for seed in range(12)])
