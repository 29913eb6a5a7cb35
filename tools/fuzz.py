"""Feed made-up files to what reads files of others: headers, indexes, packed shards.

Every target runs in a forked process that is watched from outside: one that crashes, hangs or
takes too much memory is noted with the input that did it, and started again. Where atheris is
installed (``pip install diskoffload[fuzz]``) it makes the inputs, guided by the coverage of our
code; elsewhere, and with ``--plain``, they are random mutations of the seeds, guided by nothing.

    python tools/fuzz.py --seconds 600 --json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz_engines import ATHERIS, MOST_INPUT_BYTES, chosen_engine, guided, mutations
from fuzz_targets import TARGETS, Target, expect

from diskoffload.errors import OffloadError

MIB = 1 << 20
# No case may have the process grow by more, nor answer with a longer message.
MOST_GROWTH_BYTES = 64 * MIB
MOST_ADDRESS_BYTES = 2048 * MIB
MOST_MESSAGE = 4000
HANG_SECONDS = 10.0
_GRACE_SECONDS = 30.0
_MOST_FINDINGS = 20
_FAULT_STATUS = 70


@dataclass
class Figures:
    """What came of one target.

    Attributes:
        target: its name.
        seconds: how long it ran.
        cases: inputs that were tried.
        accepted: those that were read, and gave what they say.
        refused: those that were refused by an error of ours.
        crashes: other exceptions, too much memory, wrong tensors, a dead process.
        hangs: inputs that took too long.
        edges: of our code that were reached, where atheris counted them.
        findings: what did it, and the file that holds the input.
    """

    target: str
    seconds: float = 0.0
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    edges: int = 0
    findings: list[str] = field(default_factory=list)


class Record:
    """What a running process says of itself, in a file that outlives it."""

    _FORMAT = struct.Struct("<dQQQQ")

    def __init__(self, path: Path) -> None:
        with open(path, "w+b") as file:
            file.truncate(self._FORMAT.size + MOST_INPUT_BYTES)
            self._memory = mmap.mmap(file.fileno(), 0)
        self.accepted = self.refused = self.cases = 0

    def begin(self, data: bytes) -> None:
        """Note a case before it runs."""
        self._put(time.monotonic(), len(data))
        self._memory[self._FORMAT.size : self._FORMAT.size + len(data)] = data

    def end(self, *, accepted: bool) -> None:
        """Count a case that is done."""
        self.cases += 1
        self.accepted += accepted
        self.refused += not accepted
        self._put(0.0, 0)

    def _put(self, since_seconds: float, nbytes: int) -> None:
        fields = (since_seconds, nbytes, self.cases, self.accepted, self.refused)
        self._FORMAT.pack_into(self._memory, 0, *fields)

    def read(self) -> tuple[float, bytes]:
        """Read what the other process noted: since when its case runs, or 0, and the case."""
        since_seconds, nbytes, *counts = self._FORMAT.unpack_from(self._memory, 0)
        self.cases, self.accepted, self.refused = counts
        return since_seconds, self._memory[self._FORMAT.size : self._FORMAT.size + nbytes]

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def run_case(target: Target, data: bytes) -> bool:
    """Try one input; tell whether it was accepted.

    Raises whatever is a finding: an exception that is none of ours, or :class:`Finding` where what
    was read is not what the file says, or where memory or the message has no bound.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        target(data)
        accepted = True
    except OffloadError as error:
        accepted = False
        expect(len(str(error)) < MOST_MESSAGE, "the message is too long")
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    expect(grown_bytes < MOST_GROWTH_BYTES, f"it took {grown_bytes >> 20} MiB of memory")
    return accepted


def run_target(
    name: str,
    seconds: float,
    *,
    engine: str,
    seed: int,
    keep: Path,
    hang_seconds: float = HANG_SECONDS,
) -> Figures:
    """Run one target for so long, whatever happens to it, and count."""
    figures = Figures(name)
    started = time.monotonic()
    while len(figures.findings) < _MOST_FINDINGS:
        left_seconds = started + seconds - time.monotonic()
        if left_seconds <= 0:
            break
        with tempfile.TemporaryDirectory(prefix="diskoffload-fuzz-") as folder:
            place = Path(folder)
            record = Record(place / "record")
            pid = os.fork()
            if pid == 0:
                _work(name, left_seconds, engine, seed + len(figures.findings), record, place)
            status, hung = _watch(pid, record, left_seconds, hang_seconds)
            _, case = record.read()
            figures.cases += record.cases
            figures.accepted += record.accepted
            figures.refused += record.refused
            record.close()
            edges = re.findall(r"\bcov: (\d+)", _log_of(place))
            figures.edges = max([figures.edges, *map(int, edges[-1:])])
            if not hung and status == 0:
                continue
            figures.cases += 1
            figures.hangs += hung
            figures.crashes += not hung
            fault = place / "fault"
            what = fault.read_text(encoding="utf-8") if fault.exists() else f"status {status}"
            keep.mkdir(parents=True, exist_ok=True)
            path = keep / f"{name}-{'hang' if hung else 'crash'}-{len(figures.findings)}"
            path.write_bytes(case)
            what = f"over {hang_seconds} s" if hung else what.strip().rsplit("\n", 1)[-1]
            figures.findings.append(f"{path}: {what}")
            (keep / f"{path.name}.txt").write_text(_log_of(place), encoding="utf-8")
    figures.seconds = time.monotonic() - started
    return figures


def _log_of(place: Path) -> str:
    texts = [place / "fault", place / "log"]
    return "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in texts if p.exists())


def _watch(pid: int, record: Record, seconds: float, hang_seconds: float) -> tuple[int, bool]:
    """Wait for a process; end one whose case takes too long. Gives its status, and whether."""
    deadline = time.monotonic() + seconds + hang_seconds + _GRACE_SECONDS
    hung = False
    try:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pid = 0
                return os.waitstatus_to_exitcode(status), hung
            since_seconds, _ = record.read()
            now = time.monotonic()
            too_long = since_seconds and now - since_seconds > hang_seconds
            if not hung and (too_long or now > deadline):
                hung = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        if pid:  # we are interrupted
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _work(name: str, seconds: float, engine: str, seed: int, record: Record, place: Path) -> None:
    """Be the watched process; never returns."""
    try:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with open("/proc/self/statm", encoding="ascii") as statm:
            mapped_bytes = int(statm.read().split()[0]) * mmap.PAGESIZE
        most_bytes = mapped_bytes + MOST_ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
        target = TARGETS[name](place)
        gc.freeze()  # what was imported need not be looked through again

        def one(data: bytes) -> None:
            record.begin(data[:MOST_INPUT_BYTES])
            try:
                accepted = run_case(target, data)
            except BaseException:
                (place / "fault").write_text(traceback.format_exc(), encoding="utf-8")
                os._exit(_FAULT_STATUS)
            record.end(accepted=accepted)

        seeds = target.seeds()
        if engine == ATHERIS:
            guided(one, seconds, seed, seeds, place)
        deadline = time.monotonic() + seconds
        for data in mutations(seeds, random.Random(seed)):
            one(data)
            if time.monotonic() >= deadline:
                break
        os._exit(0)
    except BaseException:
        (place / "fault").write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(_FAULT_STATUS)


def _as_text(figures: Figures) -> str:
    numbers = {k: v for k, v in asdict(figures).items() if isinstance(v, int)}
    counts = ", ".join(f"{count} {name}" for name, count in numbers.items())
    lines = [f"{figures.target}: {counts} in {figures.seconds:.0f} s", *figures.findings]
    return "\n  ".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the status is 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files that come from others.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="inputs found")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    unknown = sorted({*options.targets} - TARGETS.keys())
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}")
    names = options.targets or list(TARGETS)
    engine = chosen_engine(plain=options.plain)
    report = []
    for name in names:
        report.append(
            run_target(
                name,
                options.seconds / len(names),
                engine=engine,
                seed=options.seed,
                keep=options.keep,
            )
        )
        if not options.json:
            print(_as_text(report[-1]), flush=True)
    if options.json:
        print(json.dumps({"engine": engine, "targets": [asdict(one) for one in report]}, indent=1))
    return int(any(one.crashes or one.hangs for one in report))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
