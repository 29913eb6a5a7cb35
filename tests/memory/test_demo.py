"""The demo, run as its users run it, on a checkpoint of a few megabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sealed import fingerprint
from write_checkpoint import write_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
# The demo where no group may be made, as for most users that are not root.
FORBIDDEN = f"""
import sys
sys.path.insert(0, {str(DEMO.parent)!r})
import demo
demo.why_not = lambda: "this test forbids it"
sys.exit(demo.main())
"""


def run_demo(*arguments: str, forbidden: bool = False) -> subprocess.CompletedProcess[str]:
    program = ["-c", FORBIDDEN] if forbidden else [str(DEMO)]
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=200
    )


def test_writes_quantizes_and_says_what_it_took(tmp_path: Path, cgroup_refusal: str | None) -> None:
    data = tmp_path / "data"
    ran = run_demo("--data", str(data), "--size", "4MB")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""  # no progress bar where nobody watches
    kind = "a real memory control group" if cgroup_refusal is None else "own budget, max_memory"
    assert kind in ran.stdout
    assert "a third would be less than python and torch need" in ran.stdout
    result = data / "llama-4MB-W4A16"
    config = json.loads((result / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    for row in ("seconds to quantize", "read from the disk", "written to the disk"):
        assert row in ran.stdout
    assert ("processes killed for want of memory" in ran.stdout) == (cgroup_refusal is None)
    # Nothing but checkpoint, result, and the note that the result is the demo's.
    left = {path.name for path in data.iterdir()}
    assert left == {"llama-4MB", result.name, f".{result.name}.made-by-demo"}


@pytest.mark.slow
def test_without_a_group_it_says_so_and_takes_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    own, data = tmp_path / "own", tmp_path / "data"
    write_checkpoint(own, 4_000_000)
    before = fingerprint(own)
    # What an earlier demo left: its result, and beside it the note that it is the demo's.
    earlier = data / "own-W4A16" / "from an earlier demo"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    (data / ".own-W4A16.made-by-demo").touch()
    ran = run_demo("--data", str(data), "--checkpoint", str(own), forbidden=True)
    assert ran.returncode == 0, ran.stderr
    assert "the library's own budget, max_memory" in ran.stdout
    assert "because: this test forbids it" in ran.stdout
    assert "control group's peak" not in ran.stdout
    assert (earlier.parent / "model.safetensors").exists()
    assert not earlier.exists()
    assert fingerprint(own) == before


@pytest.mark.parametrize("taken", ["own-W4A16", "own-W4A16.partial"])
def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path, taken: str) -> None:
    own, data = tmp_path / "own", tmp_path / "data"
    write_checkpoint(own, 4_000_000)
    (data / taken).mkdir(parents=True)
    (data / taken / "thesis.txt").write_text("mine")
    ran = run_demo("--data", str(data), "--checkpoint", str(own))
    assert ran.returncode == 1
    assert f"{data / taken} is there and was not written by a demo" in ran.stderr
    assert (data / taken / "thesis.txt").read_text() == "mine"


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    ran = run_demo("--data", str(tmp_path), "--checkpoint", str(tmp_path / "none"))
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines() == [ran.stderr.strip()]
    assert "does not exist" in ran.stderr
