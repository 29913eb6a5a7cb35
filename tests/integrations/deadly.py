"""File operations that kill their process at a step, and processes that may be killed."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch
from quantize_bench import Quick

from diskoffload.resumable.note import NEW_NOTE_NAME

# Every way in which a Files changes something.
STEPS = (
    *("close", "create", "set_size", "write", "sync", "sync_folder", "rename"),
    *("remove", "make_folder", "remove_folder_if_empty", "lock"),
)


class Deadly(Quick):
    """Counts the steps that change something, and kills its process at one of them.

    Of a write, half is done by then; a step of another kind is not done.
    """

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at = kill_at
        self.count = 0
        self.noted = 0
        self.published: list[int] = []  # the steps at which a file got its name
        self.steps: list[tuple[str, int]] = []  # with what was noted before

    def step(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.steps.append((name, self.noted))
        if self.count == self.kill_at:
            if name == "write":
                fd, data, offset, path = arguments
                Quick.write(self, fd, data[: len(data) // 2], offset, path)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "rename" and arguments[0].name == NEW_NOTE_NAME:
            self.noted = json.loads(arguments[0].read_text())["note"]["done"]
        elif name == "rename" and arguments[1].suffix == ".safetensors":
            self.published.append(self.count)
        self.count += 1


def _deadly(name: str) -> Any:
    plain = getattr(Quick, name)

    def method(self: Deadly, *arguments: Any) -> Any:
        self.step(name, arguments)
        return plain(self, *arguments)

    return method


for _name in STEPS:
    setattr(Deadly, _name, _deadly(_name))


def in_child(work: Callable[[], Any]) -> int:
    """Start a process that works and ends with status 0; give its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's other threads are not here
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a process; it must have been killed, or have ended well."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
