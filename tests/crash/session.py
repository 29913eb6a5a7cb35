"""A user's program: a model worked on and committed, closed and gone on with."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nets import PARTS, Holds, Net, held_by, hold, reopened
from steps import Steps

import diskoffload

Report = Callable[[str, Holds, torch.nn.Module], None]
Try = Callable[[str, Callable[[], Any]], Any]
# So long that the journal is compacted with the fourth commit.
_NOTE_BYTES = 4000


def _just_do(what: str, action: Callable[[], Any]) -> Any:
    return action()


class Session:
    """Works on a model, and does the same to a plain one.

    Attributes:
        held: the offloaded model, while it is open.
        plain: the plain one.
    """

    def __init__(
        self, way: str, seed: int, place: Path, checkpoint: Path, report: Report, do: Try = _just_do
    ) -> None:
        """Begin with nothing.

        Args:
            way: how the model is held, see :data:`nets.WAYS`.
            seed: of all that is drawn.
            place: the offload folder.
            checkpoint: what a model may be opened from.
            report: told what is about to be committed, and what was.
            do: does each thing that may need a file, and tells the result.
        """
        self.way, self.place, self._checkpoint = way, place, checkpoint
        self._report, self._do = report, do
        self._rng = random.Random(seed)
        self.held: torch.nn.Module | None = None
        self.plain: torch.nn.Module = Net()
        self._last_note: Any = None
        self._steps = self._steps_on_plain()

    def _steps_on_plain(self) -> Steps:
        # Plain modules are taken as they are at the first commit; what has no place in the
        # checkpoint comes back from the model that one is opened with.
        parts = ("one",) if self.way == "mixed" else PARTS
        lasting = ("t", "u") if self.way == "opened" else ()
        return Steps(self._rng.randrange(1 << 30), self.plain, parts, lasting)

    def open(self, *, again: bool) -> None:
        """Hold a fresh model, or what was committed."""
        if again:
            self.held = self._do("reopen", lambda: reopened(self.way, self.place))
        else:
            self.held = self._do("hold", lambda: hold(self.way, self.place, self._checkpoint))

    def work(self, steps: int) -> None:
        """Do some random steps."""
        for _ in range(steps):
            name, act = self._steps.draw()
            self._do(name, lambda act=act: act(self.held))
            act(self.plain)
            del act
            if self._rng.random() < 0.15:
                self._do("evict", self._evict)

    def _evict(self) -> None:
        assert self.held is not None
        gc.collect()
        for module in self.held.modules():
            cache: Any = module._parameters
            if isinstance(cache, diskoffload.DiskCache):
                cache.sync()
                cache.residency.make_room(0)

    def commit(self) -> bool:
        """Commit, and say so before and after; tell whether it could be."""
        note = {"drawn": self._rng.randrange(1 << 30), "text": "x" * _NOTE_BYTES}
        holds = held_by(self.plain, note)
        self._report("begins", holds, self.plain)
        made = self._do("commit", lambda: diskoffload.commit(self.held, note))
        if made is not None:
            self._report("returned", holds, self.plain)
        return made is not None

    def close(self) -> None:
        """Let everything go; what was not committed is lost."""
        self.held = None
        gc.collect()

    def run(self, rounds: int = 5, steps: int = 3) -> None:
        """Work and commit, close and go on, and lose some work at the end."""
        self.open(again=False)
        for number in range(rounds):
            self.work(steps)
            committed = self.commit()
            if number == rounds - 2 and (committed or self.commit()):
                self.close()
                self.open(again=True)
        self.work(steps)
        self.close()

    def go_on(self, plain: torch.nn.Module, steps: int = 3) -> None:
        """Reopen what was committed of this plain model, work and commit."""
        self.plain = plain
        self._steps = self._steps_on_plain()
        self.open(again=True)
        self.work(steps)
        self.commit()
        self.close()
