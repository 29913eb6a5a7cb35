"""Runs one arm: one library doing one piece of work, in a fresh process, within its limits."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgroup import memory_cgroup

from . import caches, read_ahead
from .results import Sample

_TOOLS = Path(__file__).resolve().parent.parent
_WORST_LINE_CHARACTERS = 200


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        label: as tables and charts name it.
        work: ``"module:function"`` in this package; called in the child with ``arguments``
            and ``scratch``, an empty folder on the disk that is removed afterwards. Gives a
            list of :class:`Sample`.
        arguments: for the function; what JSON can hold.
        at: the size it works at, for samples that name none.
        needs: modules of peers; where one is missing, that is the result.
        limit_bytes: memory, file pages included, that the kernel enforces; ``None``: none.
        cold: files that must not be in the page cache when it starts.
        read_ahead: device and KiB that the kernel reads ahead meanwhile; ``None``: as it is.
        timeout_seconds: after which it is ended.
    """

    label: str
    work: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    at: float | None = None
    needs: Sequence[str] = ()
    limit_bytes: int | None = None
    cold: Sequence[Path] = ()
    read_ahead: tuple[str, int] | None = None
    timeout_seconds: float = 600.0


class ArmError(Exception):
    """An arm gave no numbers; the message is the reason, in one line."""


def run_arm(arm: Arm, work_dir: Path) -> list[Sample]:
    """Run an arm once.

    Raises:
        ArmError: a peer is missing, or it failed, was killed or took too long.
    """
    for name in arm.needs:
        if importlib.util.find_spec(name) is None:
            raise ArmError(f"{name} is not installed (pip install 'diskoffload[bench]')")
    scratch = Path(tempfile.mkdtemp(dir=work_dir, prefix="scratch-"))
    try:
        with _reading_ahead(arm):
            caches.drop(arm.cold)
            return _run(arm, scratch)
    except OSError as error:
        raise ArmError(str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _reading_ahead(arm: Arm) -> Iterator[None]:
    if arm.read_ahead is None:
        yield
        return
    with read_ahead.set_to(*arm.read_ahead):
        yield


def _run(arm: Arm, scratch: Path) -> list[Sample]:
    told = json.dumps({"work": arm.work, "arguments": dict(arm.arguments), "scratch": str(scratch)})
    command = [sys.executable, "-m", f"{__package__}.child", told]
    paths = [str(_TOOLS.parent), str(_TOOLS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    kills: int | None = 0
    try:
        if arm.limit_bytes is None:
            ran = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=arm.timeout_seconds,
                env=environment,
            )
            status, stdout, stderr = ran.returncode, ran.stdout, ran.stderr
        else:
            with memory_cgroup(arm.limit_bytes) as group:
                run = group.run(command, timeout_seconds=arm.timeout_seconds, env=environment)
                kills = group.oom_kills()
            status, stdout, stderr = run.returncode, run.stdout, run.stderr
    except subprocess.TimeoutExpired:
        raise ArmError(f"ended: it took more than {arm.timeout_seconds:.0f} s") from None
    if kills:
        limit_mib = (arm.limit_bytes or 0) >> 20
        raise ArmError(f"killed by the kernel: it needed more than {limit_mib} MiB of memory")
    if status:
        lines = stderr.strip().splitlines() or ["it said nothing"]
        raise ArmError(f"failed (status {status}): {lines[-1][:_WORST_LINE_CHARACTERS]}")
    return [Sample(**sample) for sample in json.loads(stdout)]
