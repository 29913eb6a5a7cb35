"""An exception at any line of a commit (Ctrl-C): the next commit is whole and right."""

from __future__ import annotations

import gc
import linecache
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from nets import Net, held_by, hold
from recording import Watched, using
from witness import Witness

import diskoffload

FILES = ("store/journal.py", "store/commits.py", "store/folder.py", "store/lock.py")
FILES = (*FILES, "committing/commit.py", "committing/table.py")


class Interrupt:
    """Raises at one line; counts the lines of what matters here."""

    def __init__(self, at: int) -> None:
        self.count = 0
        self.where = ""
        self._at = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.endswith(FILES) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and not _leaves_a_block(frame):
            self.count += 1
            if self.count - 1 == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def _leaves_a_block(frame: FrameType) -> bool:
    # Between the last call of a block and the call of its ``__exit__`` no signal is handled,
    # but a trace function is called there.
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith("with ")


def interrupted(way: str, root: Path, checkpoint: Path, at: int) -> Interrupt:
    """Interrupt the second of three commits; the third undoes much of it."""
    place, witness = root / "offload", Witness()
    place.mkdir()
    plain = Net()

    def begins(note: str) -> str:
        witness.begins(held_by(plain, note))
        return note

    with using(Watched()):
        held = hold(way, place, checkpoint)

        def both(action: Callable[[Any], None]) -> None:
            action(held)
            action(plain)

        with torch.no_grad():
            both(lambda net: net.one.w.add_(1))
        diskoffload.commit(held, begins("first"))
        witness.returned()

        def change(net: Any) -> None:
            net.one.w.requires_grad_(False)
            net.one.register_buffer("n", torch.arange(400.0))
            net.one.s = None
            net.two.w = torch.nn.Parameter(torch.ones(50, 50))

        old = held.two.w, plain.two.w
        both(change)
        interrupt = Interrupt(at)
        tracing, unraisable = sys.gettrace(), sys.unraisablehook
        # One in a finalizer goes no further; pytest's hook would keep its frames, and the model.
        sys.unraisablehook = lambda _: None
        sys.settrace(interrupt)
        try:
            diskoffload.commit(held, begins("second"))
            witness.returned()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
            sys.unraisablehook = unraisable

        def change_back(net: Any) -> None:
            net.one.w.requires_grad_(True)
            del net.one.n

        both(change_back)
        held.two.w, plain.two.w = old
        copy = root / "copy"
        shutil.copytree(place, copy)
        witness.check(way, copy)
        shutil.rmtree(copy)
        diskoffload.commit(held, begins("first"))
        witness.returned()
        del held, old
        gc.collect()
    try:
        witness.check(way, place)
    except Exception as error:
        raise AssertionError(f"after an interrupt at {interrupt.where}") from error
    shutil.rmtree(place)
    return interrupt


def check_interrupts(way: str, root: Path, checkpoint: Path, start: int, every: int) -> None:
    lines = interrupted(way, root, checkpoint, -1).count
    assert lines > 500
    for at in range(start, lines, every):
        assert interrupted(way, root, checkpoint, at).where


def test_interrupted_at_lines(root: Path, checkpoint: Path) -> None:
    check_interrupts("built", root, checkpoint, 5, 67)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["built", "mixed", "opened"])
def test_interrupted_at_every_line(way: str, root: Path, checkpoint: Path) -> None:
    check_interrupts(way, root, checkpoint, 0, 1)
