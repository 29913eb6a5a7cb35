"""The same command after its last step: what it would make is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import digests

import diskoffload
from diskoffload.checkpoint.publish import RECORD_NAME
from diskoffload.cli import main
from diskoffload.errors import OutputExistsError
from diskoffload.quantize import plan_quantization, quantize_checkpoint


@pytest.fixture
def source(checkpoints: Any, tmp_path: Path) -> Path:
    place = tmp_path / "source"
    shutil.copytree(checkpoints["llama"], place)
    return place


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    place = tmp_path / "out"
    quantize_checkpoint(source, place, "W4A16")
    return place


@pytest.mark.slow
def test_killed_after_its_last_step_it_ends_well(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(source), str(out), "--scheme", "W4A16"]
    program = (
        "import os, signal, sys\n"
        "from diskoffload import cli\n"
        "from diskoffload.quantize import state\n"
        "whole = state.Claim.forget\n"
        "def forget(self, folder):\n"
        "    whole(self, folder)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "state.Claim.forget = forget\n"
        f"cli.main({command!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    before = digests(out)
    again = subprocess.run(
        [sys.executable, "-m", "diskoffload.cli", *command], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "is the result of this very command already: nothing was left to do" in again.stdout
    assert digests(out) == before


def test_nothing_is_written(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = quantize_checkpoint(source, out, "W4A16")
    assert result.plan.is_made
    assert result.resumed > 0
    command = ["quantize", str(source), str(out), "--scheme", "W4A16"]
    assert main([*command, "--dry-run"]) == 0
    assert "nothing of it is left to do" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_made"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert str(source) not in (out / RECORD_NAME).read_text()  # results are published


def test_another_job_is_refused(source: Path, out: Path) -> None:
    before = digests(out)
    for options, told in (
        ({"scheme": "W8A16"}, "scheme was W4A16 and is W8A16"),
        ({"scheme": "W4A16", "ignore": ()}, "'lm_head' on the list of what is not quantized"),
        ({"scheme": "W4A16", "dtype": "float16"}, "dtype"),
    ):
        for action in (quantize_checkpoint, plan_quantization):
            with pytest.raises(OutputExistsError, match=f"the result of another job: .*{told}"):
                action(source, out, **options)
    file = next(source.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(OutputExistsError, match="time of change"):
        quantize_checkpoint(source, out, "W4A16")
    assert digests(out) == before


@pytest.mark.parametrize("harm", ["gone", "truncated", "replaced", "record", "no record"])
def test_what_is_not_whole_is_not_taken_for_the_result(source: Path, out: Path, harm: str) -> None:
    file = next(out.glob("*.safetensors"))
    told = f"the result of this very job, but {file.name} is gone or was changed"
    if harm == "gone":
        file.unlink()
    elif harm == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "replaced":
        shutil.copy(next(source.glob("*.safetensors")), file)
    elif harm == "record":
        record = out / RECORD_NAME
        record.write_text(record.read_text().replace("W4A16", "W8A16"))
        told = "the folder exists and is not empty"
    else:
        (out / RECORD_NAME).unlink()
        told = "the folder exists and is not empty"
    with pytest.raises(OutputExistsError, match=told):
        quantize_checkpoint(source, out, "W4A16")


def test_another_checkpoint_has_no_record_of_it(source: Path, out: Path, tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(source, offload_dir=tmp_path / "off")
    diskoffload.save_checkpoint(model, out, overwrite=True)
    assert not (out / RECORD_NAME).exists()
