"""A small model that is offloaded, a plain one beside it, and what either holds, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.resident import Residency

WAYS = ("built", "mixed", "opened")
PARTS = ("one", "two", "three")


def value_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Make a value that tells which it is, of small whole numbers that every dtype can hold."""
    count = torch.Size(shape).numel()
    numbers = (torch.arange(count) * 7 + seed) % 97
    return numbers.reshape(shape).to(dtype)


class Cell(torch.nn.Module):
    """A parameter of several pages, a small one, a buffer, and one that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(value_of((40, 40), torch.float32, seed))
        self.u = torch.nn.Parameter(value_of((6, 4), torch.bfloat16, seed + 1))
        self.register_buffer("s", value_of((5,), torch.int64, seed + 2))
        self.register_buffer("t", value_of((3, 3), torch.float32, seed + 3), persistent=False)


class Net(torch.nn.Module):
    """Three cells, one parameter of the first two tied."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (Cell(seed) for seed in (10, 20, 30))
        self.two.u = self.one.u


def bare_net() -> Net:
    """Make a model that has no values yet, as one is opened with."""
    net = Net()
    made: dict[int, torch.nn.Parameter] = {}
    for cell in (net.one, net.two, net.three):
        for key, one in list(cell._parameters.items()):
            assert one is not None
            empty = torch.nn.Parameter(torch.empty_like(one, device="meta"))
            cell._parameters[key] = made.setdefault(id(one), empty)
        cell._buffers["s"] = torch.empty_like(cell.s, device="meta")
    return net


def write_checkpoint(place: Path) -> Path:
    """Write the values of a fresh model as the checkpoint that one may be opened from."""
    place.mkdir()
    state = Net().state_dict()
    del state["two.u"]
    save_file(state, place / "model.safetensors")
    return place


def hold(way: str, offload_dir: Path, checkpoint: Path) -> torch.nn.Module:
    """Offload a fresh model, in one of the ways in which a model can be."""
    if way == "opened":
        return diskoffload.open_checkpoint(
            checkpoint, model=bare_net(), offload_dir=offload_dir, max_memory="1GiB"
        )
    net = Net()
    options: dict[str, Any] = {"residency": Residency()}
    for name, module in net.named_modules():
        if way == "mixed" and name == "three":
            continue  # a plain module among them
        if way == "mixed" and name == "two":
            diskoffload.offload_module(module, "cpu", "cpu", name=name, **options)
        else:
            diskoffload.offload_module(
                module, "cpu", "disk", offload_dir=offload_dir, name=name, **options
            )
    return net


def reopened(way: str, offload_dir: Path) -> torch.nn.Module:
    """Reopen what was committed there."""
    model = bare_net() if way == "opened" else Net()
    return diskoffload.reopen(offload_dir, model=model, max_memory="1GiB")


# ---------------------------------------------------------------------- what it holds


class Value(NamedTuple):
    """One entry, whole."""

    kind: str
    layout: tuple[Any, ...] = ()
    data: bytes = b""


class Holds(NamedTuple):
    """All that a model holds, and what was noted with it."""

    values: dict[str, Value]
    ties: frozenset[frozenset[str]]
    shares: frozenset[frozenset[str]]
    note: Any

    def differs_from(self, other: Holds) -> str:
        """Say in what two states differ; nothing if in nothing."""
        words = []
        for name in sorted(self.values.keys() | other.values.keys()):
            mine, theirs = self.values.get(name), other.values.get(name)
            if mine != theirs:
                words.append(f"{name}: {_short(mine)} against {_short(theirs)}")
        for what in ("ties", "shares", "note"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                words.append(f"{what}: {str(mine)[:100]} against {str(theirs)[:100]}")
        return "; ".join(words)


def _short(value: Value | None) -> str:
    if value is None:
        return "absent"
    return f"{value.kind} {value.layout} {value.data[:16].hex()}..{hash(value.data) & 0xFFFF:04x}"


def held_by(model: torch.nn.Module, note: Any = None) -> Holds:
    """Tell all that a model holds, of an offloaded one by reading it as a user does."""
    values: dict[str, Value] = {}
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for kind, mapping in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key in list(mapping):
                name = f"{prefix}.{key}" if prefix else key
                saved = "unsaved " if key in module._non_persistent_buffers_set else ""
                tensor = mapping[key]
                if tensor is None:
                    values[name] = Value("none")
                    continue
                tensors[name] = tensor
                strides = None if tensor.is_contiguous() else tensor.stride()
                layout = (tensor.dtype, tuple(tensor.shape), strides, tensor.requires_grad)
                values[name] = Value(saved + kind, layout, _bytes(tensor))
    return Holds(values, _groups(tensors, id), _groups(tensors, _storage), note)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)


def _groups(
    tensors: dict[str, torch.Tensor], key: Callable[[torch.Tensor], int]
) -> frozenset[frozenset[str]]:
    found: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(key(tensor), set()).add(name)
    return frozenset(frozenset(names) for names in found.values() if len(names) > 1)


def stray_files(offload_dir: Path, shards: set[str]) -> set[str]:
    """Name what lies in a folder beside the journal, the lock and the committed shards."""
    found: set[str] = set()
    with suppress(FileNotFoundError):
        found = {path.name for path in offload_dir.iterdir()}
    return found - shards - {"diskoffload.journal", "diskoffload.lock", "holds-commits.txt"}
