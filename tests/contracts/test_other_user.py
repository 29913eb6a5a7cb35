"""A model on a checkpoint of somebody else's, whose files one may read and nothing more."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from ways import make_net

NOBODY = 65534
SCRIPT = Path(__file__).with_name("edit_as_other_user.py")


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder that others may enter; pytest's own let nobody else in."""
    folder = Path(tempfile.mkdtemp(prefix="other-user-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(place: Path) -> Path:
    net = make_net()
    state = {name: value for name, value in net.state_dict().items() if name != "head.weight"}
    folder = place / "checkpoint"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o444)
    folder.chmod(0o555)
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_edits_of_a_checkpoint_that_one_does_not_own(checkpoint: Path, place: Path) -> None:
    file = checkpoint / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    work = place / "work"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    run = subprocess.run(
        [sys.executable, SCRIPT, checkpoint, work, str(NOBODY)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # After setuid the kernel tells a process nothing of its pages: edits are found without.
    assert not found.pop("pagemap")
    assert found == {"owner": 0, "user": NOBODY, "saved": True, "writable": False}
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in work.iterdir()) == ["out"]
