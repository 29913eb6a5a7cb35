"""A small checkpoint that is packed, or unpacked, over and over, to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import digests
from quantize_bench import Quick

from diskoffload.packing import pack, pack_checkpoint, unpack, work
from diskoffload.resumable.note import NOTE_NAME
from diskoffload.system.files import Files


class PackBench:
    """A job that is done over and over, and what it must give."""

    def __init__(self, root: Path, job: work.Job) -> None:
        self.root = root
        self.job = job
        self.out, self.partial = job.out, job.partial
        self.work()
        self.expected = digests(self.out)
        self.clear()

    @property
    def is_finished(self) -> bool:
        return self.out.exists() and not (self.out / NOTE_NAME).exists()

    def work(self, files: Files | None = None, stop: Callable[[], bool] = lambda: False) -> int:
        job = replace(self.job, files=files or Quick())
        return work.carry_out(job, show_progress=False, stop=stop)

    def check(self) -> None:
        """Hold the result against an uninterrupted run's; make place for the next."""
        assert digests(self.out) == self.expected
        assert [path.name for path in self.root.iterdir()] == ["out"]
        self.clear()

    def clear(self) -> None:
        for path in self.root.iterdir():
            shutil.rmtree(path)


def make_bench(checkpoint: Path, root: Path, kind: str) -> PackBench:
    """Plan a job on a copy of a checkpoint that has files beside its weights; do it once."""
    source = root / "source"
    shutil.copytree(checkpoint, source)
    (source / "tokenizer.json").write_text("no tokenizer" * 1000)
    (source / "more").mkdir()
    (source / "more" / "template.txt").write_text("template")
    place = root / "place"
    place.mkdir()
    job: Any
    if kind == "pack":
        job = pack._prepare(source, place / "out", "zstd")[1]
    else:
        pack_checkpoint(source, root / "packed")
        job = unpack._prepare(root / "packed", place / "out")[1]
    bench = PackBench(place, job)
    assert {"tokenizer.json", "more/template.txt"} <= bench.expected.keys()
    if kind == "unpack":
        assert bench.expected == digests(source)
    return bench
