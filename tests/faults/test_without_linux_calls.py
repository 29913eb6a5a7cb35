"""What is promised holds on the portable paths as well, and they ask nothing of Linux."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diskoffload.system.portable import SWITCH

TESTS = Path(__file__).resolve().parent.parent
# A part of what "make test-portable" runs: two ways of holding, and commits.
PART = [
    str(TESTS / "contracts" / "test_edits.py"),
    str(TESTS / "contracts" / "test_module_contract.py"),
    str(TESTS / "commits" / "test_commit.py"),
    "-k=disk and not elsewhere and not written and not blind and not training and not context"
    " or scratch and not second",
]
ONE = [str(TESTS / "contracts" / "test_edits.py"), "-k=foreach and disk-streamed"]

pytestmark = pytest.mark.slow


def run(place: Path, switch: str, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "linux_calls"]
    done = subprocess.run(
        [*command, "--basetemp", str(place / "inner"), *arguments],
        env={**os.environ, SWITCH: switch, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_what_is_promised_holds_without_linux_calls(tmp_path: Path) -> None:
    status, said = run(tmp_path, "1", *PART)
    assert status == 0, said[-5000:]
    assert "asked of Linux: 0 times" in said
    assert said.count(".") > 100  # one for each test that passed


@pytest.mark.skipif(sys.platform != "linux", reason="nowhere else is there anything to ask")
def test_what_is_asked_of_linux_is_seen(tmp_path: Path) -> None:
    status, said = run(tmp_path, "0", *ONE)
    assert status == pytest.ExitCode.INTERNAL_ERROR, said[-5000:]
    assert re.search(r"asked of Linux: open /proc/self/cgroup .*system/headroom\.py", said)
    assert re.search(r"asked of Linux: open .*\.safetensors with .*system/files\.py", said)
    assert re.search(r"asked of Linux: [1-9]\d* times", said)
