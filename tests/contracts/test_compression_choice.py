"""Which tensors are compressed: all, none, what a function says, or where it pays."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import diskoffload
from diskoffload import DiskCache, InvalidInputError
from diskoffload.inspect import inspect_path
from diskoffload.store import payoff
from diskoffload.store.folder import Folder
from diskoffload.store.payoff import Payoff, measure_payoff
from diskoffload.system.files import Files
from diskoffload.system.portable import IS_LINUX

pytestmark = pytest.mark.usefixtures("no_garbage")


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(300, 300) for _ in range(3)]
    return torch.nn.Sequential(*layers, torch.nn.Embedding(700, 64)).bfloat16()


def only_linear(name: str, tensor: Any) -> bool:
    return name.endswith("weight") and tuple(tensor.shape) == (300, 300)


def packed_in(folder: Path) -> set[str]:
    """Name what lies compressed in a folder."""
    return {one.name for one in inspect_path(folder).tensors if one.compression is not None}


LINEAR = {"0.weight", "1.weight", "2.weight"}


@pytest.mark.parametrize("way", ["offload_model", "dispatch_with_map", "dispatch_model"])
def test_a_function_chooses_by_full_name_and_layout(tmp_path: Path, way: str) -> None:
    model, folder = net(), tmp_path / "o"
    options: dict[str, Any] = {"offload_dir": folder, "compression": only_linear}
    if way == "offload_model":
        diskoffload.offload_model(model, "cpu", "disk", **options)
    elif way == "dispatch_with_map":
        places = dict.fromkeys(("0", "1", "2", "3"), ("cpu", "disk"))
        diskoffload.dispatch_with_map(model, places, show_progress=False, **options)
    else:
        diskoffload.dispatch_model(model, max_memory={"cpu": 0}, **options)
    model[0]._parameters.sync()
    assert packed_in(folder) == LINEAR
    for name, value in net().named_parameters():
        assert torch.equal(model.get_parameter(name), value)
    diskoffload.remove_dispatch(model)


def test_copies_pickles_and_new_values_keep_the_choice(tmp_path: Path) -> None:
    asked: list[str] = []

    def choose(name: str, tensor: Any) -> str | None:
        asked.append(name)
        return "zstd" if only_linear(name, tensor) else None

    model = diskoffload.offload_model(
        net(), "cpu", "disk", offload_dir=tmp_path / "o", compression=choose
    )
    twin = copy.deepcopy(model)
    cache: Any = twin[1]._parameters
    assert cache.compression is choose
    assert diskoffload.get_cache_init_kwargs(twin[1])["compression"] is choose
    cache.sync()
    asked.clear()
    with torch.no_grad():
        twin[1].weight.mul_(2)
        twin[1].bias.mul_(2)
    cache.sync()
    assert sorted(asked) == ["1.bias", "1.weight"]
    assert {name.partition("#")[0] for name in packed_in(tmp_path / "o")} == LINEAR
    plain = pickle.loads(pickle.dumps(twin))
    assert torch.equal(plain[1].weight, net()[1].weight * 2)
    assert torch.equal(model[1].weight, net()[1].weight)


@pytest.mark.parametrize("wrong", [5, "lz4", ["zstd"], b"zstd"])
def test_what_is_no_choice_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InvalidInputError):
        DiskCache("cpu", offload_dir=tmp_path / "o", compression=wrong)
    module = torch.nn.Linear(3, 3)
    before = module.weight
    with pytest.raises(InvalidInputError):
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=tmp_path / "o", compression=wrong
        )
    assert module.weight is before


@pytest.mark.parametrize("wrong", [5, "lz4", ["zstd"]])
def test_a_function_that_says_nonsense_is_told_of(tmp_path: Path, wrong: Any) -> None:
    module = torch.nn.Linear(3, 3)
    before = module.weight
    with pytest.raises(InvalidInputError, match="function given as compression says"):
        diskoffload.offload_module(
            module,
            "cpu",
            "disk",
            offload_dir=tmp_path / "o",
            compression=lambda name, tensor: wrong,
            name="m",
        )
    assert module.weight is before
    assert diskoffload.get_offloaded_device(module) != "disk"


def measured(reads: float) -> Payoff:
    return Payoff(reads, reads, 1e9, 5e8, 0.67, 2, True)


@pytest.mark.parametrize(("reads", "packs"), [(1e8, True), (3e9, False)])
def test_auto_measures_once_a_folder_and_says_what_it_chose(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reads: float,
    packs: bool,
) -> None:
    caplog.set_level("INFO", logger="diskoffload")
    places: list[Path] = []

    def measure(folder: Path, files: Files) -> Payoff:
        places.append(folder)
        return measured(reads)

    monkeypatch.setattr(payoff, "measure_payoff", measure)
    model = diskoffload.offload_model(
        net(), "cpu", "disk", offload_dir=tmp_path / "o", compression="auto"
    )
    model[0]._parameters.sync()
    assert places == [tmp_path / "o"]
    assert (packed_in(tmp_path / "o") >= {*LINEAR, "3.weight"}) is packs
    assert packs or not packed_in(tmp_path / "o")
    said = (
        f'compression="auto" in {tmp_path / "o"}: {chr(34) + "zstd" + chr(34) if packs else "none"}'
    )
    assert f"{said}, because the disk reads" in caplog.text
    other = diskoffload.offload_module(
        torch.nn.Linear(3, 3), "cpu", "disk", offload_dir=tmp_path / "p", compression="auto"
    )
    assert places == [tmp_path / "o", tmp_path / "p"]
    del other


def test_auto_is_found_out_once_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: list[int] = []
    monkeypatch.setattr(
        payoff, "measure_payoff", lambda folder, files: count.append(1) or measured(1e8)
    )
    folder = Folder(tmp_path / "o")
    barrier = threading.Barrier(4)

    def put(number: int) -> None:
        barrier.wait()
        folder.put(f"t{number}", torch.zeros(10), "auto")

    threads = [threading.Thread(target=put, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder.close()
    assert count == [1]


def test_a_function_may_leave_it_to_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payoff, "measure_payoff", lambda folder, files: measured(1e8))
    model = diskoffload.offload_model(
        net(),
        "cpu",
        "disk",
        offload_dir=tmp_path / "o",
        compression=lambda name, _: "auto" if name == "1.weight" else False,
    )
    model[0]._parameters.sync()
    assert packed_in(tmp_path / "o") == {"1.weight"}


def test_what_is_measured_is_real_and_leaves_nothing(disk_path: Path) -> None:
    with torch.device("meta"):  # a caller's mode is not to reach it
        found = measure_payoff(disk_path, Files())
    assert list(disk_path.iterdir()) == []
    assert found.is_past_cache is IS_LINUX
    assert 0.66 < found.share < 0.69
    for speed in (found.reads, found.writes, found.decodes, found.encodes):
        assert 1e6 < speed < 1e12
    assert found.pays == (found.reads * 1.1 < found.decodes)
    assert "the disk reads" in str(found)


def test_a_folder_that_cannot_be_measured_is_told_of(tmp_path: Path) -> None:
    class Full(Files):
        def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
            raise diskoffload.NoSpaceError(28, "as the test wishes", str(path))

    with pytest.raises(diskoffload.NoSpaceError):
        measure_payoff(tmp_path, Full())
    assert list(tmp_path.iterdir()) == []
