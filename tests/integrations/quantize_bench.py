"""A small checkpoint that is quantized over and over, to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from models import digests

from diskoffload.quantize import QuantizeResult, run
from diskoffload.quantize.plan import Job, prepare
from diskoffload.resumable.note import NOTE_NAME
from diskoffload.system.files import Files

MAX_SHARD_BYTES = 82_450  # three files; a weight begins in one and ends in the next


class Quick(Files):
    """Does not wait for the device: only a power cut would tell."""

    def sync(self, fd: int, path: Path) -> None:
        self.size_bytes(fd, path)  # it must be open

    def sync_folder(self, path: Path) -> None:
        assert path.is_dir()


def noted(folder: Path) -> int:
    """How many tensors a folder's note calls done."""
    path = folder / NOTE_NAME
    return json.loads(path.read_text())["note"]["done"] if path.exists() else 0


@dataclass
class Bench:
    """A job that is done over and over, and what it must give."""

    root: Path
    job: Job
    expected: dict[str, str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def partial(self) -> Path:
        return self.root / "out.partial"

    @property
    def is_finished(self) -> bool:
        return self.out.exists() and not (self.out / NOTE_NAME).exists()

    def work(
        self, files: Files | None = None, stop: Callable[[], bool] = lambda: False
    ) -> QuantizeResult:
        plan = replace(self.job.plan, out=str(self.out))
        return run.carry_out(replace(self.job, plan=plan, files=files or Quick()), stop=stop)

    def check(self) -> None:
        """Hold the result against an uninterrupted run's; make place for the next."""
        assert digests(self.out) == self.expected
        assert [path.name for path in self.root.iterdir()] == ["out"]
        self.clear()

    def clear(self) -> None:
        for path in self.root.iterdir():
            shutil.rmtree(path)


def make_bench(checkpoint: Path, root: Path) -> Bench:
    """Plan a job on a copy of a checkpoint that has files beside its weights; do it once."""
    source = root / "source"
    shutil.copytree(checkpoint, source)
    (source / "tokenizer.json").write_text("no tokenizer" * 1000)
    (source / "more").mkdir()
    (source / "more" / "template.txt").write_text("template")
    place = root / "place"
    place.mkdir()
    job = prepare(source, place / "out", "W4A16", ["lm_head"], None, MAX_SHARD_BYTES)
    file_of = {p[0]: file for file, planned in job.layout.files.items() for p in planned}
    assert len(job.layout.files) == 3
    assert any(len({file_of[key] for key in keys}) > 1 for keys in job.outputs.values())
    bench = Bench(place, job, {})
    bench.work()
    bench.expected = digests(bench.out)
    assert {"tokenizer.json", "more/template.txt"} <= bench.expected.keys()
    bench.clear()
    return bench
