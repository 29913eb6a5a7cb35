"""A fault at any file operation: a named error, nothing lost, and the same objects work on."""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nets import WAYS
from recording import Failing, using
from session import Session
from witness import Witness

from diskoffload.errors import OffloadError


class Faults:
    """A session during which operations fail."""

    def __init__(self, root: Path, way: str, seed: int, checkpoint: Path, files: Failing) -> None:
        self.files = files
        self.errors = 0
        self._witness = Witness()
        self._way, self._root = way, root
        (root / "offload").mkdir()
        self._session = Session(
            way, seed, root / "offload", checkpoint, self._witness.report, self._do
        )

    def run(self) -> None:
        """Work through it; whatever fails has to succeed once the cause is gone."""
        try:
            with using(self.files):
                self._session.run()
            if self.files.lasts:
                self._check_as_if_killed()
            self._witness.check(self._way, self._root / "offload")
        except Exception as error:
            words = f"{self.files.failed} failed, of {len(self.files.watched)} operations"
            raise AssertionError(words) from error
        shutil.rmtree(self._root / "offload")

    def _do(self, what: str, action: Callable[[], Any]) -> Any:
        # Nothing but our own errors; at most twice for one fault: what was written behind
        # our back, and what was to be done itself.
        for _ in range(2):
            try:
                return action()
            except OffloadError:
                assert self.files.failed
                self.errors += 1
        if self.files.lasts:
            self._check_as_if_killed()
            self.files.heal()
        return action()

    def _check_as_if_killed(self) -> None:
        copy = self._root / "copy"
        shutil.copytree(self._root / "offload", copy)
        self._witness.check(self._way, copy)
        shutil.rmtree(copy)


def operations(root: Path, way: str, seed: int, checkpoint: Path) -> list[str]:
    files = Failing(-1)
    Faults(root, way, seed, checkpoint, files).run()
    return [what for what, _ in files.watched]


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize(
    ("way", "code"), [("built", errno.EIO), ("mixed", errno.ENOSPC), ("opened", errno.EIO)]
)
def test_faults_at_operations(
    way: str, code: int, lasts: bool, root: Path, checkpoint: Path
) -> None:
    count = len(operations(root, way, 1, checkpoint))
    errors = 0
    for at in range(code % 7 + lasts, count, 29):
        faults = Faults(root, way, 1, checkpoint, Failing(at, code, lasts=lasts))
        faults.run()
        errors += faults.errors
    assert errors > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("way", WAYS)
def test_faults_at_every_operation(
    way: str, code: int, lasts: bool, root: Path, checkpoint: Path
) -> None:
    for at in range(len(operations(root, way, 2, checkpoint))):
        Faults(root, way, 2, checkpoint, Failing(at, code, lasts=lasts)).run()
        gc.collect()
