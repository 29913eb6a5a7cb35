"""A model to break the disk under, and disks that break."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import diskoffload
import diskoffload.store.folder
from diskoffload.residency.resident import Residency
from diskoffload.system.files import Files, naming_faults

KIB = 1 << 10
_PATIENCE_SECONDS = 60


class Net(torch.nn.Module):
    """Some 400 KiB in two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(128, 400)
        self.down = torch.nn.Linear(400, 128, bias=False)
        self.register_buffer("scale", torch.full((16,), 2.0))


def bare() -> Net:
    with torch.device("meta"):
        return Net()


def offloaded(place: Path, files: Files | None = None) -> Net:
    torch.manual_seed(0)
    net, residency = Net(), Residency()
    with using(files or Files()):
        for name, module in net.named_modules():
            diskoffload.offload_module(
                module, "cpu", "disk", offload_dir=place, name=name, residency=residency
            )
    return net


@contextmanager
def using(files: Files) -> Iterator[None]:
    """Have every folder that is opened meanwhile do its file operations through this object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diskoffload.store.folder, "Files", lambda: files)
        yield


def values(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def edit(net: Net, number: float) -> dict[str, torch.Tensor]:
    """Change some of a model in place; give what it has then."""
    with torch.no_grad():
        net.up.weight.mul_(number)
        net.down.weight[3] = number
        net.scale.fill_(number)
    return values(net)


def check(net: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = values(net)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def check_committed(place: Path, expected: dict[str, torch.Tensor]) -> None:
    """Look at the last commit as another process would, while the folder is in use."""
    check(diskoffload.reopen(place, model=bare(), read_only=True, verify="full"), expected)
    gc.collect()


def check_reopened(place: Path, expected: dict[str, torch.Tensor]) -> None:
    gc.collect()
    check(diskoffload.reopen(place, model=bare(), verify="full"), expected)
    gc.collect()
    assert not [path.name for path in place.iterdir() if path.name.endswith((".partial", ".new"))]


class Failing(Files):
    """Refuses the operations named in ``failing``, as the system would."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code
        self.failing: set[str] = set()

    def _try(self, what: str, path: Path) -> None:
        if what in self.failing:
            with naming_faults(what.replace("_", " "), path):
                raise OSError(self.code, os.strerror(self.code))

    def open_for_reading(self, path: Path) -> int:
        self._try("open_for_reading", path)
        return super().open_for_reading(path)

    def create(self, path: Path) -> int:
        self._try("create", path)
        return super().create(path)

    def open_for_writing(self, path: Path) -> int:
        self._try("open_for_writing", path)
        return super().open_for_writing(path)

    def read_into(self, fd: int, target: memoryview, offset: int, path: Path) -> None:
        self._try("read_into", path)
        super().read_into(fd, target, offset, path)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        self._try("write", path)
        super().write(fd, data, offset, path)

    def set_size(self, fd: int, nbytes: int, path: Path) -> None:
        self._try("set_size", path)
        super().set_size(fd, nbytes, path)

    def sync(self, fd: int, path: Path) -> None:
        self._try("sync", path)
        super().sync(fd, path)

    def sync_folder(self, path: Path) -> None:
        self._try("sync_folder", path)
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._try("rename", target)
        super().rename(source, target)


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """Lower one of this process' limits for a while."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def in_child(work: Callable[[], object], user: int | None = None) -> tuple[object, int]:
    """Do something in a forked process: give its answer, and the signal that ended it, or 0."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()
            signal.alarm(_PATIENCE_SECONDS)
            torch.set_num_threads(1)  # the parent's other threads are not here
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            answer: object = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(text) if text else None, os.WTERMSIG(status) if status else 0


def tried(work: Callable[[], object]) -> str:
    """Do something and say what came of it: ``ok``, or the error's name and text."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"
