"""Who saw what was committed, and tells whether a reopened folder holds just that."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from nets import Holds, held_by, reopened, stray_files
from recording import Watched, using

import diskoffload
from diskoffload.errors import CommitError

Allowed = frozenset[int | None]


class Witness:
    """Knows every state that was to be committed, and which of them may be found now.

    Attributes:
        states: every state that a commit was begun of.
        allowed: by number, those that may be found; ``None`` stands for no commit at all.
    """

    def __init__(self) -> None:
        self.states: list[Holds] = []
        self.allowed: Allowed = frozenset({None})

    def begins(self, holds: Holds) -> None:
        """See a commit begin: from now on it may be found, whole."""
        self.states.append(holds)
        self.allowed |= {len(self.states) - 1}

    def returned(self) -> None:
        """See the commit that was begun last return: nothing else may be found any more."""
        self.allowed = frozenset({len(self.states) - 1})

    def report(self, what: str, holds: Holds, plain: torch.nn.Module) -> None:
        """Hear it from a session."""
        if what == "begins":
            self.begins(holds)
        else:
            assert self.states[-1] is holds
            self.returned()

    def check(self, way: str, offload_dir: Path, allowed: Allowed | None = None) -> int | None:
        """Reopen a folder; tell which state was found.

        Raises:
            AssertionError: it is none of those that may be found, or more is in the folder.
        """
        allowed = self.allowed if allowed is None else allowed
        try:
            with using(Watched()):  # whatever fails elsewhere
                model = reopened(way, offload_dir)
        except CommitError as error:
            assert "nothing was committed" in str(error), error
            assert None in allowed, f"nothing was found, and {sorted(map(str, allowed))} may be"
            return None
        committed = diskoffload.last_commit(model)
        found = held_by(model, committed.note)
        strays = stray_files(offload_dir, set(committed.shards))
        del model
        gc.collect()
        assert not strays, f"found beside what was committed: {sorted(strays)}"
        differences = {
            number: found.differs_from(self.states[number])
            for number in allowed
            if number is not None
        }
        for number, difference in differences.items():
            if not difference:
                return number
        raise AssertionError(f"found none of the states that may be: {differences}")
