"""Many threads on one model, several models at once, and a process that is forked meanwhile."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from threaded import (
    ALL_BYTES,
    PATIENCE_SECONDS,
    GatedFiles,
    Shelf,
    quick_switches,
    value_of,
    work_together,
)

import diskoffload
from diskoffload.residency.held import held_of
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder

WAYS: dict[str, dict[str, Any]] = {
    "disk": {},
    "zstd": {"compression": "zstd"},
    "elsewhere": {"onload_device": "cpu:0"},
}


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    with quick_switches():
        yield


@pytest.fixture(params=WAYS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(WAYS[request.param])


def reader(shelf: Shelf, seed: int) -> Callable[[], None]:
    """Make a job that reads entries at random and holds on to a few of them for a while."""
    chance = random.Random(seed)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read() -> None:
        entry = chance.randrange(len(shelf.changes))
        tensor = shelf.read(entry)
        if shelf.changes[entry] == "assign":  # which leaves the tensor that was there alone
            held.append((tensor.data, tensor.detach().clone()))
        if len(held) > 5:
            view, value = held.pop(chance.randrange(len(held)))
            assert torch.equal(view, value), "a held tensor's value changed"

    return read


def keeper(shelf: Shelf) -> None:
    """Read within ``disable_offloading``, where what was read stays."""
    with diskoffload.disable_offloading():
        for entry in [*range(len(shelf.changes))] * 2:
            shelf.read(entry)


def changer(shelf: Shelf) -> Callable[[], None]:
    entries = itertools.cycle(range(len(shelf.changes)))
    return lambda: shelf.change(next(entries))


def jobs_on(shelf: Shelf) -> list[Callable[[], None]]:
    return [
        *(reader(shelf, seed) for seed in range(4)),
        changer(shelf),
        partial(keeper, shelf),
        shelf.evict,
        shelf.sync,
    ]


def check_at_the_end(shelf: Shelf) -> None:
    assert shelf.begun == shelf.done
    assert all(shelf.done)
    shelf.read_all()
    shelf.sync()
    shelf.read_all()


def test_every_value_read_is_one_that_was_written(options: dict[str, Any], tmp_path: Path) -> None:
    shelf = Shelf(Folder(tmp_path / "off", group_bytes=64 << 10), **options)
    work_together(2.0, *jobs_on(shelf))
    check_at_the_end(shelf)


@pytest.mark.slow
def test_every_value_read_for_a_minute(options: dict[str, Any], tmp_path: Path) -> None:
    shelf = Shelf(Folder(tmp_path / "off", group_bytes=64 << 10), **options)
    work_together(60.0, *jobs_on(shelf))
    check_at_the_end(shelf)


@pytest.mark.parametrize("books", ["of each", "shared"])
def test_two_models_on_one_folder_in_two_threads_each(books: str, tmp_path: Path) -> None:
    residency = Residency()
    options = {"residency": residency} if books == "shared" else {}
    shelves = [Shelf(tmp_path / "off", **options) for _ in range(2)]
    assert shelves[0].module._parameters.folder is shelves[1].module._parameters.folder
    jobs = [job for shelf in shelves for job in (changer(shelf), reader(shelf, 0), shelf.sync)]
    work_together(1.0, *jobs)
    for shelf in shelves:
        check_at_the_end(shelf)


def test_models_are_made_and_dropped_in_two_threads_on_one_folder(tmp_path: Path) -> None:
    def live() -> None:
        shelf = Shelf(tmp_path / "off")
        change = changer(shelf)
        for _ in shelf.changes:
            change()
        shelf.sync()
        check_at_the_end(shelf)

    work_together(1.5, live, live)


def test_a_forward_while_another_thread_syncs_and_evicts(
    options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    inputs = torch.rand(3, 48)
    expected = model(inputs).detach()
    onload = options.pop("onload_device", "cpu")
    residency = Residency()
    other = torch.nn.Parameter(torch.zeros(4000))
    for name, module in [*model.named_modules()]:
        diskoffload.offload_module(
            module,
            onload,
            "disk",
            offload_dir=tmp_path / "off",
            name=name,
            residency=residency,
            **options,
        )
    model.register_parameter("other", other)

    def forward() -> None:
        with torch.no_grad():
            assert torch.equal(model(inputs), expected)

    def backward() -> None:
        loss = model(inputs).sum()
        torch.autograd.grad(loss, [model[0].weight, model[2].bias])

    def edit_and_sync() -> None:
        other.data.add_(1)
        model._parameters.sync()

    def evict() -> None:
        residency.make_room(ALL_BYTES)

    work_together(1.5, forward, forward, backward, edit_and_sync, evict)


def test_of_two_threads_that_assign_to_one_entry_one_wins_for_good(tmp_path: Path) -> None:
    """What lost is shown by another module still, but must not come back where it lost."""
    residency = Residency()
    shelf, *sources = [Shelf(tmp_path / "off", 1, residency=residency) for _ in range(3)]
    tensors = [source.module.e0 for source in sources]

    def assign(tensor: torch.Tensor) -> None:
        shelf.module._parameters["e0"] = tensor

    threads = [threading.Thread(target=assign, args=(tensor,)) for tensor in tensors]
    with residency.lock:  # both have begun when the first of them may go on
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    winner = shelf.module.e0
    for source, tensor in zip(sources, tensors, strict=True):
        with diskoffload.disable_offloading():  # has the read look again what is there
            assert source.module.e0 is tensor
        assert shelf.module.e0 is winner


def test_modules_that_share_a_tensor_come_and_go_in_two_threads(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "off", 1, compression="zstd")
    last: dict[int, torch.nn.Module] = {}

    def come_and_go() -> None:
        module = torch.nn.Module()
        module.register_parameter("e0", shelf.module.e0)
        diskoffload.offload_module(module, "cpu", "disk", **shelf.options)
        last[threading.get_ident()] = module

    work_together(1.5, come_and_go, come_and_go)
    gc.collect()
    shelf.sync()
    shelf.evict()
    for module in (*last.values(), shelf.module):
        assert torch.equal(module.e0, value_of(0, 0))
        shelf.evict()
    held = held_of(shelf.module.e0)
    assert held is not None
    assert len(held.bindings) == 1 + len(last)


@pytest.mark.parametrize("is_held", [True, False])
def test_an_edit_made_while_its_older_value_is_written_is_on_disk_after_sync(
    is_held: bool, tmp_path: Path
) -> None:
    files = GatedFiles()
    folder = Folder(tmp_path / "off", files=files, group_bytes=1)
    shelf = Shelf(folder, 1)
    shelf.sync()
    tensors = [shelf.module.e0]
    with files.shut():
        diskoffload.update_offload_parameter(shelf.module, "e0", value_of(0, 1))
        later = folder.put("later", torch.zeros(1), None)  # has what waits be written
        assert files.arrived.wait(PATIENCE_SECONDS)  # the writer has the bytes of version 1
        tensors[0].data.copy_(value_of(0, 2))
        if not is_held:
            tensors.clear()
        opening = threading.Timer(0.2, files.gate.set)
        opening.start()
        shelf.sync()
        opening.join()
    assert later.stored is not None
    written = [load_file(path) for path in (tmp_path / "off").glob("*.safetensors")]
    tensors = [tensor for one in written for tensor in one.values()]
    assert any(torch.equal(tensor, value_of(0, 2)) for tensor in tensors)
