#!/usr/bin/env python3
"""Open and quantize a checkpoint three times larger than the memory it is given.

A child process does the work, in a real memory control group where one can be made. What
it took is measured and printed. Nothing but the folder given by ``--data`` is written to.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cgroup import MemoryCgroup, memory_cgroup, why_not
from measure import Measurement, measured
from write_checkpoint import write_checkpoint

import diskoffload
from diskoffload.budget import format_bytes, parse_bytes
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import BudgetError, OffloadError, OutputExistsError
from diskoffload.inspect import inspect_path
from diskoffload.quantize import quantize_checkpoint
from diskoffload.system.memory import anonymous_bytes_of_process

SCHEME = "W4A16"
# What the interpreter with torch, transformers and compressed-tensors takes by itself:
# 300 MB of anonymous memory, and libraries that would else be read again and again.
FLOOR_BYTES = 700_000_000


@dataclass(frozen=True)
class Task:
    """What the child process is told.

    Attributes:
        source: the checkpoint.
        out: the folder of the result.
        limit_bytes: memory for all of the process.
        report: the file for what it has measured.
    """

    source: str
    out: str
    limit_bytes: int
    report: str


def main() -> int:
    """Run the demo; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="one of your own, which is only read")
    parser.add_argument(
        "--data", type=Path, default=Path("demo-data"), help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--size", default="3GB", help="of the checkpoint to make, if none is given (%(default)s)"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.task:
            _work(Task(**json.loads(options.task)))
            return 0
        return _demonstrate(options.checkpoint, options.data, options.size)
    except OffloadError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------- outside the limit


def _demonstrate(given: Path | None, data: Path, size: str) -> int:
    data.mkdir(parents=True, exist_ok=True)
    _heading("The checkpoint")
    source = _made_checkpoint(data, size) if given is None else given
    checkpoint = Checkpoint(source)
    size_bytes = checkpoint.size_bytes
    for shard in checkpoint.shards.values():
        _drop_from_page_cache(shard.path)
    _say(
        f"{checkpoint.path}: {format_bytes(size_bytes)} in {len(checkpoint.shards)} files, "
        f"{len(checkpoint.tensors)} tensors; dropped from the page cache, so that the disk is read"
    )
    del checkpoint
    out = _cleared_result(data, source)
    limit_bytes = max(size_bytes // 3, FLOOR_BYTES)
    _heading("The limit")
    with tempfile.TemporaryDirectory(dir=data, prefix=".demo-") as scratch:
        task = Task(str(source), str(out), limit_bytes, str(Path(scratch, "report.json")))
        with _limited(limit_bytes, size_bytes) as group:
            status = _run_child(task, group)
            if status == 0:
                report = json.loads(Path(task.report).read_text(encoding="utf-8"))
                _heading("What was written")
                _say(str(out))
                _say(inspect_path(out).as_table(only_shards=True))
                _heading("What it took")
                _say(_table(report, size_bytes, limit_bytes, group))
        return status


def _made_checkpoint(data: Path, size: str) -> Path:
    path = data / f"llama-{size.replace(' ', '')}"
    if not path.exists():
        _say(f"writing a Llama with random weights, {size}, to {path} ...")
    started_seconds = time.monotonic()
    written = write_checkpoint(path, parse_bytes(size))
    if written:
        _say(f"written in {time.monotonic() - started_seconds:.1f} s; later runs use it again")
    return path


def _drop_from_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cleared_result(data: Path, source: Path) -> Path:
    """Name the result's folder; what an earlier demo left there is removed, nothing else."""
    name = source.resolve().stem if source.is_file() else source.resolve().name
    out = data / f"{name}-{SCHEME}"
    partial = out.with_name(out.name + ".partial")
    # Beside the result, because what lies in that is exactly what the library writes.
    mark = data / f".{out.name}.made-by-demo"
    if mark.exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    for folder in (out, partial):
        if folder.exists():
            raise OutputExistsError(
                f"{folder} is there and was not written by a demo; move it away, or name "
                "another folder with --data (make demo DEMO_DIR=...)"
            )
    mark.touch()
    return out


@contextmanager
def _limited(limit_bytes: int, size_bytes: int) -> Iterator[MemoryCgroup | None]:
    """Make the control group, or say why there is none."""
    share = f"{format_bytes(limit_bytes)}, {_percent(limit_bytes, size_bytes)} of the checkpoint"
    if limit_bytes == FLOOR_BYTES:
        share += " (a third would be less than python and torch need by themselves)"
    reason = why_not()
    if reason is not None:
        _say(f"the library's own budget, max_memory: {share} for the whole process")
        _say(f"no memory control group, which the kernel would enforce, because: {reason}")
        yield None
        return
    with memory_cgroup(limit_bytes) as group:
        swap = "no swap" if group.swap_is_limited else "it may swap: the kernel cannot forbid it"
        _say(f"a real memory control group (cgroup version {group.version}; {swap}): {share}")
        _say("file pages count, too; a process that needs more is killed by the kernel")
        yield group


def _run_child(task: Task, group: MemoryCgroup | None) -> int:
    command = [sys.executable, __file__, "--task", json.dumps(asdict(task))]
    sys.stdout.flush()
    if group is None:
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    status = group.run(command, capture=False).returncode
    if group.oom_kills():
        print(
            f"\ndemo: the kernel killed the work, because it needed more than "
            f"{format_bytes(group.limit_bytes)}",
            file=sys.stderr,
        )
        return 1
    return status


# ---------------------------------------------------------------------- within the limit


def _work(task: Task) -> None:
    """Do what is demonstrated, and write down what it took."""
    logging.basicConfig(level=logging.WARNING, format="  %(message)s", stream=sys.stdout)
    logging.getLogger("diskoffload").setLevel(logging.INFO)
    _heading("Opening it")
    with (
        tempfile.TemporaryDirectory(dir=Path(task.report).parent) as offload_dir,
        measured() as opening,
    ):
        model = diskoffload.open_checkpoint(task.source, offload_dir=offload_dir)
        count = sum(parameter.numel() for parameter in model.parameters())
        name = type(model).__name__
        del model
    _say(
        f"{name}, {count / 1e9:.2f} billion parameters, in {opening.seconds:.1f} s "
        f"(python's imports included): metadata only, {_bytes(opening.read_bytes)} read"
    )
    _heading(f"Quantizing it to {SCHEME}")
    interpreter_bytes = anonymous_bytes_of_process() or 0
    if interpreter_bytes >= task.limit_bytes:
        raise BudgetError(
            f"the interpreter alone takes {format_bytes(interpreter_bytes)} and the limit is "
            f"{format_bytes(task.limit_bytes)}; nothing is left to work with"
        )
    with measured() as quantizing:
        result = quantize_checkpoint(
            task.source,
            task.out,
            SCHEME,
            max_memory=task.limit_bytes - interpreter_bytes,
            show_progress=sys.stderr.isatty(),
        )
    _say(
        f"{len(result.plan.quantized)} weights quantized, {len(result.plan.copied)} tensors "
        f"copied as they are, in {quantizing.seconds:.1f} s"
    )
    report = {
        "opening": opening.as_json(),
        "quantizing": quantizing.as_json(),
        "result_bytes": result.plan.written_bytes,
        "planned_memory_bytes": result.plan.memory_bytes,
    }
    Path(task.report).write_text(json.dumps(report), encoding="utf-8")
    sys.stdout.flush()


# ---------------------------------------------------------------------- showing


def _table(
    report: dict[str, Any], size_bytes: int, limit_bytes: int, group: MemoryCgroup | None
) -> str:
    opening = Measurement(**report["opening"])
    work = Measurement(**report["quantizing"])
    rows: list[tuple[str, str, int | None]] = [
        ("seconds to open", f"{opening.seconds:.1f}", None),
        ("seconds to quantize", f"{work.seconds:.1f}", None),
        ("size of the checkpoint", "", size_bytes),
        ("size of the result", "", report["result_bytes"]),
        ("read from the disk", "", work.read_bytes),
        ("written to the disk", "", work.written_bytes),
        ("limit on memory", "", limit_bytes),
        ("peak anonymous memory", "", work.peak_anonymous_bytes),
        ("  python, torch and the rest before", "", work.before_anonymous_bytes),
    ]
    if work.peak_anonymous_bytes is not None and work.before_anonymous_bytes is not None:
        own_bytes = work.peak_anonymous_bytes - work.before_anonymous_bytes
        rows.append(("  quantizing itself", "", own_bytes))
    rows.append(("  quantizing, as planned (at most)", "", report["planned_memory_bytes"]))
    if group is not None:
        rows.append(("control group's peak, file pages included", "", group.peak_bytes()))
        rows.append(("processes killed for want of memory", str(group.oom_kills()), None))
    lines = []
    for label, text, amount_bytes in rows:
        share = "" if amount_bytes is None else _percent(amount_bytes, size_bytes)
        lines.append(f"{label:42s} {text or _bytes(amount_bytes):>9s}  {share:>5s}".rstrip())
    return "\n".join([*lines, "percentages are of the checkpoint's size"])


def _bytes(amount_bytes: int | None) -> str:
    return "not known" if amount_bytes is None else format_bytes(amount_bytes)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.0f} %"


def _heading(text: str) -> None:
    print(f"\n{text}")


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
