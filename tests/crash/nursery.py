"""Where processes that are to be killed come from: forked from one that has imported torch.

Run as a script it reads one JSON object a line and forks a child for each, which works in a
folder until it ends or is killed. It answers with the child's pid, and with its exit code when
it has ended and it was asked for that.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from nets import Holds, write_checkpoint
from recording import Killing, using
from session import Session
from witness import Witness

CRADLE = Path(__file__).resolve().parent


class Nursery:
    """Talks to the process that forks."""

    def __init__(self) -> None:
        # Its messages go nowhere: a process that is killed says nothing of interest.
        self._process = subprocess.Popen(
            [sys.executable, str(CRADLE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def begin(self, **wanted: Any) -> int:
        """Have a child begin; give its pid."""
        self._say(json.dumps(wanted, default=str))
        return int(self._answer())

    def end(self) -> int:
        """Wait for the child; give its exit code, negative for a signal."""
        self._say("end")
        return int(self._answer())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery has died"
        return line

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


# ---------------------------------------------------------------------- what a child tells


class Diary:
    """What a child is about to do and has done, where its parent finds it afterwards."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._count = 0

    def report(self, what: str, holds: Holds, plain: torch.nn.Module) -> None:
        """Write it down; what was written survives the process."""
        if what == "begins":
            with open(self.place / f"state-{self._count}", "wb") as state:
                torch.save((holds, plain), state)
            self._count += 1
        self.tell(what)

    def tell(self, what: str) -> None:
        with open(self.place / "events", "a", encoding="ascii") as events:
            events.write(f"{what}\n")

    def read(self, witness: Witness) -> list[str]:
        """Let a witness know; give the words told beside."""
        events = self.place / "events"
        words = []
        for what in events.read_text("ascii").splitlines() if events.exists() else ():
            if what == "begins":
                number = self._count
                self._count += 1
                with open(self.place / f"state-{number}", "rb") as state:
                    witness.begins(torch.load(state, weights_only=False)[0])
            elif what == "returned":
                witness.returned()
            else:
                words.append(what)
        return words


# ---------------------------------------------------------------------- the script


def _work(wanted: dict[str, Any]) -> None:
    files = Killing(wanted["at"], wanted["when"])
    diary = Diary(Path(wanted["diary"]))
    session = Session(
        wanted["way"],
        wanted["seed"],
        Path(wanted["place"]),
        Path(wanted["checkpoint"]),
        diary.report,
    )
    with using(files):
        if wanted.get("go_on_from"):
            with open(wanted["go_on_from"], "rb") as state:
                session.go_on(torch.load(state, weights_only=False)[1])
        else:
            session.run()
    diary.tell(f"operations {files.count}")


def _live(wanted: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        _work(wanted)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _warm_up() -> None:
    place = Path(tempfile.mkdtemp())
    for way in ("built", "opened"):
        checkpoint = write_checkpoint(place / f"source-{way}")
        wanted = {"way": way, "seed": 0, "place": place / way, "checkpoint": checkpoint}
        (place / f"diary-{way}").mkdir()
        _work({**wanted, "diary": place / f"diary-{way}", "at": -1, "when": "before"})
    shutil.rmtree(place)
    gc.collect()
    gc.freeze()


def _serve() -> None:
    torch.set_num_threads(1)  # a pool's threads would be missing after the fork
    _warm_up()
    while line := sys.stdin.readline():
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _live(wanted)
        print(pid, flush=True)
        sys.stdin.readline()  # until then its pid is nobody else's
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
