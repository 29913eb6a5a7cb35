"""The path to an accelerator, on a stand-in: ``cpu:0``, whose copies come as late as they may.

A stream's copies are done in order, whenever the device likes. Here none is done before somebody
waits for it: who used memory too early, or again too early, would get the wrong bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.resident import Residency
from diskoffload.store import device_way
from diskoffload.system.accelerators import Accelerators, Event

DEVICE = torch.device("cpu:0")
LAYERS, WIDTH = 6, 128
WEIGHT_BYTES = WIDTH * WIDTH * 4


class LateEvent:
    def __init__(self, lane: LateLane) -> None:
        self._lane = lane

    def synchronize(self) -> None:
        self._lane.run_until(self)


class LateLane:
    """Copies when it is waited for."""

    def __init__(self, owner: StandIn) -> None:
        self._owner = owner
        self._waiting: deque[tuple[LateEvent, torch.Tensor, torch.Tensor]] = deque()
        self._lock = threading.Lock()
        self.staged = 0

    def staging(self, nbytes: int) -> torch.Tensor:
        self.staged += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def empty(self, nbytes: int) -> torch.Tensor:
        made = torch.zeros(nbytes, dtype=torch.uint8)
        self._owner.note(made)
        return made

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        event = LateEvent(self)
        with self._lock:
            self._waiting.append((event, source, target))
        return event

    def hand_over(self, tensor: torch.Tensor, event: Event) -> None:
        assert isinstance(event, LateEvent)
        self.run_until(event)

    def run_until(self, wanted: LateEvent) -> None:
        with self._lock:  # two threads may wait, and neither goes on before it is done
            while any(event is wanted for event, _, _ in self._waiting):
                _, source, target = self._waiting.popleft()
                target.copy_(source)


class StandIn(Accelerators):
    """Takes ``cpu:0`` for a device with so much memory."""

    def __init__(self, capacity_bytes: int = 1 << 30) -> None:
        self.capacity_bytes = capacity_bytes
        self.lanes: list[LateLane] = []
        self.most_bytes = 0
        self._used_bytes = 0

    def is_one(self, device: torch.device) -> bool:
        return device == DEVICE

    def available_bytes(self, device: torch.device) -> int | None:
        return self.capacity_bytes - self._used_bytes

    def lane(self, device: torch.device) -> LateLane | None:  # type: ignore[override]
        if not self.is_one(device):
            return None
        self.lanes.append(LateLane(self))
        return self.lanes[-1]

    def note(self, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel()
        self._used_bytes += nbytes
        self.most_bytes = max(self.most_bytes, self._used_bytes)
        weakref.finalize(tensor.untyped_storage(), self._gone, nbytes)

    def _gone(self, nbytes: int) -> None:
        self._used_bytes -= nbytes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_way, "PIECE_BYTES", 10_000)  # seven a weight


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{n}.weight": torch.randn(WIDTH, WIDTH) for n in range(LAYERS)}


def opened(tmp_path: Path, stand_in: StandIn) -> Any:
    save_file(weights(), tmp_path / "model.safetensors")
    model = diskoffload.open_checkpoint(
        tmp_path / "model.safetensors",
        model=bare_model(),
        offload_dir=tmp_path / "o",
        mode="mapped",
    )
    move(model, stand_in)
    return model


def move(model: Any, stand_in: StandIn) -> None:
    residency = Residency(mode="mapped", accelerators=stand_in)
    for name, layer in model.named_children():
        kwargs = {**diskoffload.get_cache_init_kwargs(layer), "onload_device": DEVICE}
        diskoffload.module.reoffload_module(layer, **kwargs, name=name, residency=residency)


def test_what_arrives_is_what_was_read(tmp_path: Path) -> None:
    stand_in = StandIn()
    model, expected = opened(tmp_path, stand_in), weights()
    for _ in range(2):
        for n in range(LAYERS):
            assert torch.equal(model[n].weight, expected[f"{n}.weight"]), n
    (lane,) = stand_in.lanes
    assert lane.staged == 3  # pieces are used again, once they were copied


def test_what_comes_next_is_loaded_ahead(tmp_path: Path) -> None:
    stand_in = StandIn()
    model = opened(tmp_path, stand_in)
    first = model[0].weight
    model[0]._parameters.residency.quiesce()
    assert stand_in.capacity_bytes - stand_in.available_bytes(DEVICE) == 3 * WEIGHT_BYTES
    assert torch.equal(model[1].weight, weights()["1.weight"])
    assert torch.equal(first, weights()["0.weight"])


def test_where_there_is_no_room_nothing_comes_ahead_and_what_is_unused_leaves(
    tmp_path: Path,
) -> None:
    stand_in = StandIn(3 * WEIGHT_BYTES)
    model, expected = opened(tmp_path, stand_in), weights()
    for _ in range(2):
        for n in range(LAYERS):
            assert torch.equal(model[n].weight, expected[f"{n}.weight"]), n
    assert stand_in.most_bytes <= 2 * WEIGHT_BYTES


def test_kept_values_count_against_the_device_and_leave_it(tmp_path: Path) -> None:
    stand_in = StandIn(4 * WEIGHT_BYTES)
    model, expected = opened(tmp_path, stand_in), weights()
    residency = model[0]._parameters.residency
    with diskoffload.disable_offloading():
        for _ in range(2):
            for n in range(LAYERS):
                assert torch.equal(model[n].weight, expected[f"{n}.weight"]), n
        assert 2 * WEIGHT_BYTES <= residency.loaded_bytes <= 3 * WEIGHT_BYTES
        assert residency.evicted_count
    assert stand_in.most_bytes <= 4 * WEIGHT_BYTES


def test_an_edit_on_the_device_reaches_the_disk(tmp_path: Path) -> None:
    stand_in = StandIn(2 * WEIGHT_BYTES)
    model = opened(tmp_path, stand_in)
    with torch.no_grad():
        model[2].weight.mul_(2)
    for n in range(LAYERS):
        model[n].weight.sum()
    assert torch.equal(model[2].weight, weights()["2.weight"] * 2)
    diskoffload.save_checkpoint(model, tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    saved = diskoffload.open_checkpoint(file, model=bare_model())
    assert torch.equal(saved[2].weight, weights()["2.weight"] * 2)  # type: ignore[index]


def bare_model() -> torch.nn.Sequential:
    with torch.device("meta"):
        return torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )


def test_a_wrong_byte_is_told_to_who_reads_it(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(weights(), whole / "model.safetensors")
    plain: Any = diskoffload.open_checkpoint(whole, model=bare_model(), offload_dir=tmp_path / "o")
    diskoffload.save_checkpoint(plain, tmp_path / "saved")  # with checksums
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        offset = file.read_bytes().index(saved.get_tensor("3.weight").numpy().tobytes())
    with file.open("r+b") as opened_file:
        opened_file.seek(offset + 7)
        byte = opened_file.read(1)[0]
        opened_file.seek(offset + 7)
        opened_file.write(bytes([byte ^ 1]))
    model: Any = diskoffload.open_checkpoint(file, model=bare_model(), mode="mapped")
    move(model, StandIn())
    for n in (0, 1, 2, 4, 5):
        assert torch.equal(model[n].weight, weights()[f"{n}.weight"])
    with pytest.raises(diskoffload.DamagedFileError, match=r"3\.weight"):
        model[3].weight.sum()
