"""Threads and children that work on one model, and values that tell whether they are right."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import diskoffload
from diskoffload.residency.resident import Residency
from diskoffload.system.files import Files

# A value is version * _ENTRIES + entry in every element; float32 is exact far beyond that.
_ENTRIES = 16
_SIZE = 2048  # two pages and more, so that a torn or misplaced one is seen
PATIENCE_SECONDS = 60.0
CHILD_SECONDS = 20.0
# More than any budget: whatever may leave leaves.
ALL_BYTES = 1 << 60


def in_a_child(action: Callable[[], object], patience_seconds: float = CHILD_SECONDS) -> None:
    """Do something in a forked child; what it raises is this process's failure too."""
    sys.stdout.flush()
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            action()
            os.write(sender, b"fine")
        except BaseException:
            os.write(sender, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(sender)
    try:
        ready, _, _ = select.select([receiver], [], [], patience_seconds)
        said = os.read(receiver, 8192).decode() if ready else "the child waits for ever"
    finally:
        os.close(receiver)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert said == "fine", said


def value_of(entry: int, version: int) -> torch.Tensor:
    """Make the value that an entry has in a version."""
    return torch.full((_SIZE,), float(version * _ENTRIES + entry))


class Shelf:
    """An offloaded module, each of whose entries is changed in one way by one thread.

    Attributes:
        module: its entries are ``e0``, ``e1``, ...
        changes: by entry, how it is changed.
        begun: by entry, the newest version of which a change was begun.
        done: by entry, the newest version whose change has returned.
    """

    def __init__(self, folder: Any, count: int = 6, **options: Any) -> None:
        self.module = torch.nn.Module()
        for entry in range(count):
            self.module.register_parameter(f"e{entry}", torch.nn.Parameter(value_of(entry, 0)))
        options = {"residency": Residency(), **options, "offload_dir": folder}
        onload = options.pop("onload_device", "cpu")
        diskoffload.offload_module(self.module, onload, "disk", **options)
        self.options = options
        self.residency: Residency = options["residency"]
        self.changes = [("update", "assign", "edit")[entry % 3] for entry in range(count)]
        self.begun = [0] * count
        self.done = [0] * count

    @torch.no_grad()
    def change(self, entry: int, how: str = "") -> None:
        """Give an entry its next version, in its own or another of the ways there are."""
        how = how or self.changes[entry]
        version = self.begun[entry] = self.begun[entry] + 1
        name, value = f"e{entry}", value_of(entry, version)
        if how == "update":
            diskoffload.update_offload_parameter(self.module, name, value)
            value.fill_(-1)  # the value was taken at the call
        elif how == "assign":
            setattr(self.module, name, torch.nn.Parameter(value))
        else:
            getattr(self.module, name).data.copy_(value)
        self.done[entry] = version

    def read(self, entry: int) -> torch.Tensor:
        """Read an entry and check that every element is of a version that may be seen now.

        All elements of an assigned parameter are of one version. One that is updated while
        it is read may hold two, as a plain one may.
        """
        oldest = self.done[entry]
        tensor = getattr(self.module, f"e{entry}")
        seen = tensor.detach().clone()
        newest = self.begun[entry]
        assert seen.shape == (_SIZE,)
        versions = (seen - entry) / _ENTRIES
        assert torch.equal(versions, versions.round()), f"a foreign value in e{entry}: {seen}"
        first, last = int(versions.min()), int(versions.max())
        assert oldest <= first <= last <= newest, (oldest, first, last, newest)
        whole = self.changes[entry] == "assign" or oldest == newest
        assert not whole or first == last, f"versions {first} to {last} in one value"
        return tensor

    def read_all(self) -> None:
        """Read every entry twice, and have all leave between."""
        for _ in range(2):
            for entry in range(len(self.begun)):
                self.read(entry)
            self.evict()

    def evict(self) -> None:
        """Have all leave memory that may."""
        self.residency.make_room(ALL_BYTES)
        for held in self.residency.entries():
            self.residency.release(held)

    def sync(self) -> None:
        """Have everything on disk."""
        cache: Any = self.module._parameters
        cache.sync()


def work_together(seconds: float, *jobs: Callable[[], object]) -> None:
    """Do every job in a thread of its own, again for so long; raise what any of them raises."""
    stop = time.monotonic() + seconds
    failures: list[BaseException] = []

    def repeat(job: Callable[[], object]) -> None:
        try:
            job()
            while time.monotonic() < stop and not failures:
                job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=repeat, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + PATIENCE_SECONDS)
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if failures:
        raise failures.pop()
    assert not stuck, f"{stuck} wait for ever"


@contextmanager
def quick_switches() -> Iterator[None]:
    """Have threads take turns as often as they can, so that what is rare happens."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class GatedFiles(Files):
    """File operations that go on only while a gate is open.

    Attributes:
        gate: open at first; see :meth:`shut`.
        arrived: whether a write of a tensor has come to the shut gate.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Let no write of a tensor end before the context does, or the gate is opened."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        super().write(fd, data, offset, path)
        if offset and not self.gate.is_set():  # what comes first is the header
            self.arrived.set()
            self.gate.wait(PATIENCE_SECONDS)
