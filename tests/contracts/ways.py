"""The ways in which a model's tensors may be held; a contract runs on each of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.held import State
from diskoffload.residency.resident import Residency

WAYS = (
    "plain",
    "cpu",
    "cpu-elsewhere",
    "disk",
    "disk-written",
    "disk-elsewhere",
    "zstd-written",
    "opened",
    "opened-cast",
    "disk-streamed",
    "zstd-streamed",
)
# What they do others do too, nearly: the whole contract on them is for the slow tests.
SLOW_WAYS = ("cpu-elsewhere", "opened-cast", "zstd-streamed")
DISK_WAYS = tuple(way for way in WAYS if not way.startswith(("plain", "cpu")))


class Net(torch.nn.Module):
    """A small module with what modules have: a tie, a buffer, one that is not saved, a None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.up = torch.nn.Linear(16, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.down = torch.nn.Linear(64, 16, bias=False)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids) * self.scale + self.table
        return self.head(self.down(torch.relu(self.norm(self.up(hidden)))))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def hold(net: Net, way: str, folder: Path) -> Net:
    """Hold a model's tensors in one of the ways; the values stay the same."""
    if way == "plain":
        return net
    if way.startswith("opened"):
        return _opened(net, way, folder)
    residency = streamed(Residency(0, mode="streamed")) if "streamed" in way else Residency()
    for name, module in net.named_modules():
        options: dict[str, object] = {"name": name, "residency": residency}
        if not way.startswith("cpu"):
            options["offload_dir"] = folder / "offload"
            options["compression"] = "zstd" if way.startswith("zstd") else None
        # Spelled cpu:0 the onload device is not the one that tensors wait on, so they are
        # really copied there and back: a stand-in for an accelerator where there is none.
        onload = "cpu:0" if way.endswith("elsewhere") else "cpu"
        offload = "cpu" if way.startswith("cpu") else "disk"
        diskoffload.offload_module(module, onload, offload, **options)
    if way.endswith(("-written", "-streamed")):
        written(net)
    return net


def _opened(net: Net, way: str, folder: Path) -> Net:
    (folder / "checkpoint").mkdir()
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}
    dtype = torch.float64 if way == "opened-cast" else None
    stored = {
        name: tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    save_file(stored, folder / "checkpoint" / "model.safetensors")
    with torch.device("meta"):
        bare = Net()
    bare.table = net.table
    bare.eval()
    return diskoffload.open_checkpoint(
        folder / "checkpoint", model=bare, offload_dir=folder / "offload", max_memory="1GiB"
    )


def streamed(residency: Residency) -> Residency:
    """Have tensors streamed however small they are; without a budget nothing unused stays."""
    residency._streaming.least_bytes = 1
    return residency


def written(net: torch.nn.Module) -> None:
    """Have every change on disk."""
    for module in net.modules():
        if isinstance(module._parameters, diskoffload.DiskCache):
            module._parameters.sync()
            return


IDS = torch.arange(32)


def left_memory(net: torch.nn.Module) -> None:
    """Have every change on disk, and every copy that nobody uses out of memory."""
    for _ in range(2):  # what is stored is laid beneath an object at the next look
        gc.collect()
        written(net)
    for module in net.modules():
        if isinstance(module._parameters, diskoffload.OffloadCache):
            module._parameters.residency.make_room(0)
            return


def check_same(net: torch.nn.Module, plain: torch.nn.Module, in_use: tuple[str, ...] = ()) -> None:
    """Compare all values, now and after they have left memory; only those in use stay there."""
    for _ in range(2):
        mine, theirs = net.state_dict(), plain.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].dtype == value.dtype, name
            assert mine[name].shape == value.shape, name
            assert torch.equal(mine[name], value), name
        del mine, theirs, value
        left_memory(net)
    if isinstance(net._parameters, diskoffload.DiskCache):
        # A thread that packed or wrote the last of it may still be letting go of it.
        deadline = time.monotonic() + 5
        while not set(kept_in_memory(net)) <= set(in_use):
            assert time.monotonic() < deadline, kept_in_memory(net)
            time.sleep(0.01)
            left_memory(net)


def kept_in_memory(net: torch.nn.Module) -> Iterator[str]:
    """Name the entries whose values are in memory of their own, though they could be on disk."""
    for module in net.modules():
        for mapping in (module._parameters, module._buffers):
            entries = mapping.held_items() if isinstance(mapping, diskoffload.OffloadCache) else ()
            for _, held in entries:
                if held is not None and held.state in (State.FRESH, State.LOADED):
                    yield held.name
