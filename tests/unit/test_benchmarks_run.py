"""The benchmarks from the command line, as small as they go."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.__main__ import main

from diskoffload.system.files import memory_file_system

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_access_end_to_end(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    chosen = ("--only", "access", "--tiny", "--arm", "plain", "--arm", "diskoffload, offloaded")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "tools.benchmarks", *chosen),
            *("--out", str(out), "--work-dir", str(work)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    assert list(work.iterdir()) == []
    found = json.loads((out / "report.json").read_text())
    assert found["machine"]["packages"]["torch"]
    assert str(tmp_path) not in json.dumps(found)
    figure = found["figures"]["access"]
    labels = {number["label"] for number in figure["numbers"]}
    assert labels == {"plain module", "diskoffload, offloaded from memory"}
    assert all(number["median"] > 0 for number in figure["numbers"])
    verdicts = {one["case"]: one["verdict"] for one in figure["targets"] if one["key"] == "read"}
    assert verdicts["20 tensors, offloaded"] in {"met", "NOT MET"}
    assert verdicts["20 tensors, checkpoint"] == "not measured"  # that arm was left out
    assert figure["faults"] == []
    text = (out / "report.md").read_text()
    assert "| plain module |" in text
    assert "## Against the targets" in text
    if importlib.util.find_spec("matplotlib") is None:
        assert "no charts: " in ran.stdout
    else:
        assert (out / "access.svg").read_text().startswith("<?xml")


def test_a_disk_is_not_measured_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("/dev/shm")
    if not (os.access(place, os.W_OK) and memory_file_system(place)):
        pytest.skip("no folder in memory here")
    assert main(["--only", "sweep", "--out", str(tmp_path), "--work-dir", str(place)]) == 2
    assert "which is memory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
