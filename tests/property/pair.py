"""A module held by ``DiskCache`` and a plain one, to which the same things are done."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.residency.held import State, held_of
from diskoffload.residency.resident import Residency, current_value
from diskoffload.store.folder import Folder

WAYS = ("disk", "zstd", "elsewhere", "opened")
PARTS = ("one", "two")
NAMES = ("w", "u", "s", "t")
ENTRIES = tuple((part, name) for part in PARTS for name in NAMES)
# More than what every step's reads could keep in place, so that all leaves that may.
_ALL_BYTES = 1 << 60
# A plain module refuses some of what is drawn; it must be refused with the same exception.
_REFUSALS = (TypeError, KeyError, AttributeError, RuntimeError, ValueError, IndexError)


class Cell(torch.nn.Module):
    """A large parameter, which has pages of its own, a small one, and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(value_of((40, 40), torch.float32, 1))
        self.u = torch.nn.Parameter(value_of((6, 4), torch.float32, 2), requires_grad=False)
        self.register_buffer("s", value_of((5,), torch.float32, 3))
        self.register_buffer("t", value_of((33, 33), torch.float32, 4))


class Root(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Cell()
        self.two = Cell()


def value_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Make a value of small whole numbers, which every dtype can hold."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + seed) % 7).reshape(shape).to(dtype)


def at(root: Any, entry: tuple[str, str]) -> Any:
    """Read an entry."""
    return getattr(getattr(root, entry[0]), entry[1])


def put(root: Any, entry: tuple[str, str], value: Any) -> None:
    """Assign to an entry."""
    setattr(getattr(root, entry[0]), entry[1], value)


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return value.clone().T if value.dim() == 2 else value
    if layout == "every second" and value.dim():
        return value.repeat_interleave(2, 0)[::2]
    if layout == "expanded" and value.dim():
        return value[:1].clone().expand(value.shape) if len(value) else value
    return value


def seen_as(tensor: torch.Tensor, form: str) -> Any:
    if form in ("view", "flat", "transposed") and tensor.requires_grad:
        tensor = tensor.detach()  # without grad mode torch has its own trouble with views of leaves
    if form == "data":
        return tensor.data
    if form == "detached":
        return tensor.detach()
    if form == "view":
        return tensor[..., :2]
    if form == "flat":
        return tensor.view(-1)
    if form == "transposed":
        return tensor.mT if tensor.dim() else tensor
    if form == "numpy":
        return torch.from_numpy(tensor.detach().numpy())
    return tensor


def edit(target: torch.Tensor, how: str, number: int) -> None:
    if how == "add":
        target.add_(1)
    elif how == "fill":
        target.fill_(number)
    elif how == "zero":
        target.zero_()
    elif how == "first":
        target[0] = number
    elif how == "last":
        target[..., -1] = number
    else:
        target.copy_(value_of(tuple(target.shape), target.dtype, number))


class Outcome:
    """What came of doing something to one side: a result, or the kind of its exception."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.result: Any = None
        self.refused: type[Exception] | None = None
        self.message = ""
        try:
            self.result = action()
        except _REFUSALS as error:
            self.refused, self.message = type(error), str(error)


class Pair:
    """The two modules, and every tensor that was read of them and is still held."""

    def __init__(self, way: str, folder: Path, group_bytes: int, max_bytes: int) -> None:
        self.residency = Residency(max_bytes)
        self.folder = folder
        self.offload = Folder(folder / "offload", group_bytes=group_bytes)
        self.plain = Root()
        # Spelled so it is not the device that tensors wait on: a stand-in for an accelerator.
        self.device = torch.device("cpu:0" if way == "elsewhere" else "cpu")
        self.held = Root()
        if way == "opened":
            self.held = _opened(folder, self.offload, max_bytes)
            self.residency = self.held.one._parameters.residency
        else:
            options: dict[str, Any] = {
                "offload_dir": self.offload,
                "residency": self.residency,
                "compression": "zstd" if way == "zstd" else None,
            }
            for name, module in self.held.named_modules():
                options["name"] = name
                diskoffload.offload_module(module, self.device, "disk", **options)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.retired: list[tuple[torch.nn.Module, torch.nn.Module]] = []

    # -------------------------------------------------------------- doing the same to both

    def both(self, action: Callable[[Root], Any]) -> tuple[Any, Any]:
        """Do something to either module; what the plain one refuses, ours must refuse alike."""
        mine, theirs = Outcome(lambda: action(self.held)), Outcome(lambda: action(self.plain))
        assert mine.refused is theirs.refused, f"{mine.message!r} against {theirs.message!r}"
        return mine.result, theirs.result

    def keep(self, tensors: tuple[Any, Any]) -> None:
        """Hold on to what was read, as a user does."""
        if isinstance(tensors[0], torch.Tensor):
            self.kept.append(tensors)

    def evict(self, how: str) -> None:
        """Have memory given up in one of the ways there are."""
        if how == "make_room":
            self.residency.make_room(_ALL_BYTES)
        elif how == "release":
            for held in self.residency.entries():
                self.residency.release(held)
        elif how == "sync":
            self.held.one._parameters.sync()
            self._check_disk()
        else:
            gc.collect()

    def _check_disk(self) -> None:
        for held in {held.root for held in self.residency.entries()}:
            if held.state is State.AS_IS:
                continue
            backing, changed = current_value(held)
            assert isinstance(backing, DiskBacking), held
            assert changed is None, held
            assert backing.stored is not None, held
            if held.tensor is not None and held.state is not State.VACANT:
                assert torch.equal(backing.stored.load(), held.tensor.detach()), held

    def wait_for_the_writer(self) -> None:
        """Let what the writer has begun end, so that the same steps give the same again."""
        for _, write in list(self.offload._writer._running):
            write.exception()

    def copy(self, keep_original: bool) -> None:
        """Go on with a deep copy of each; the originals must stay as they are."""
        theirs = Outcome(partial(copied, self.plain))
        if theirs.refused:
            return  # a graph's result is in it; ours is not asked what it does
        mine = copy.deepcopy(self.held)
        if keep_original:
            self.retired.append((self.held, self.plain))
        self.held, self.plain = mine, theirs.result

    # -------------------------------------------------------------- comparing

    def compare(self) -> None:
        """Compare everything that can be read or is held, objects and values."""
        entries = _all_entries(self.held, self.plain)
        for mine, theirs in self.retired:
            entries += _all_entries(mine, theirs)
        every = entries + self.kept
        for number, (mine, theirs) in enumerate(every):
            same_tensor(mine, theirs, f"tensor {number} of {len(entries)} entries and the held")
        by_mine: dict[int, int] = {}
        by_theirs: dict[int, int] = {}
        for number, (mine, theirs) in enumerate(every):
            first = by_mine.setdefault(id(mine), number)
            # The same object appears at the same places on both sides: identity and ties.
            assert first == by_theirs.setdefault(id(theirs), number), "objects differ"


def copied(root: Root) -> Root:
    """Copy a plain module deeply, and keep its views of one storage views of one storage.

    We promise that of ours, whereas :mod:`copy` takes Parameters apart that share memory.
    """
    memo: dict[int, Any] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    tensors = [tensor for one in _mappings(root) for tensor in one.values() if tensor is not None]
    on_storage = Counter(
        tensor.untyped_storage()._cdata for tensor in {id(one): one for one in tensors}.values()
    )
    for tensor in tensors:
        if not tensor.is_leaf:
            raise RuntimeError("a graph's result has no deep copy")
        storage = tensor.untyped_storage()
        if on_storage[storage._cdata] == 1 or id(tensor) in memo:
            continue
        if not _is_dense(tensor):
            raise RuntimeError("test_columns_of_a_matrix_leave_memory")
        made = torch.empty(0, dtype=tensor.dtype)
        made.set_(
            storages.setdefault(storage._cdata, storage.clone()),
            tensor.storage_offset(),
            tensor.size(),
            tensor.stride(),
        )
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(tensor)] = made.requires_grad_(tensor.requires_grad)
    return copy.deepcopy(root, memo)


def _mappings(root: Root) -> list[dict[str, torch.Tensor | None]]:
    parts = [getattr(root, part) for part in PARTS]
    return [mapping for part in parts for mapping in (part._parameters, part._buffers)]


def same_tensor(mine: torch.Tensor, theirs: torch.Tensor, which: str) -> None:
    """Compare what a user can see of two tensors."""
    for what, look in _LOOKS.items():
        seen, expected = Outcome(partial(look, mine)), Outcome(partial(look, theirs))
        assert seen.refused is expected.refused, f"{which}: {what}: {seen.message!r}"
        assert seen.result == expected.result, f"{which}: {what}"
    # A copy closes gaps, but ours leaves those of a view of what other entries were views of too.
    if _is_dense(theirs) and (_is_dense(mine) or not _is_view(mine)):
        assert _steps(mine) == _steps(theirs), f"{which}: strides"
    assert torch.equal(mine.detach(), theirs.detach()), f"{which}: values"
    if isinstance(mine, torch.nn.Parameter) and mine.grad is not None:
        assert torch.equal(mine.grad, theirs.grad), f"{which}: gradients"


_LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "type": type,
    "dtype": lambda one: one.dtype,
    "shape": lambda one: tuple(one.shape),
    "requires_grad": lambda one: one.requires_grad,
    "is_leaf": lambda one: one.is_leaf,
    "has a gradient": lambda one: isinstance(one, torch.nn.Parameter) and one.grad is not None,
}


def _is_dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_view(tensor: torch.Tensor) -> bool:
    held = held_of(tensor)
    return held is not None and held.root is not held


def _steps(tensor: torch.Tensor) -> list[int]:
    if not tensor.numel():
        return []
    # A dimension of one element is never stepped along, so any number may stand there.
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _all_entries(mine: Any, theirs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for part in PARTS:
        here, there = getattr(mine, part), getattr(theirs, part)
        assert here.state_dict().keys() == there.state_dict().keys()
        for mapping in ("_parameters", "_buffers"):
            one, other = getattr(here, mapping), getattr(there, mapping)
            assert list(one) == list(other)
            assert len(one) == len(other)
            for name in other:
                assert (one[name] is None) == (other[name] is None), f"{part}.{name}"
                if other[name] is not None:
                    shown = one[name] is getattr(here, name)
                    assert shown == (other[name] is getattr(there, name)), f"{part}.{name}"
                    found.append((one[name], other[name]))
    return found


def _opened(folder: Path, offload: Folder, max_bytes: int) -> Root:
    file = folder / "model.safetensors"
    save_file(Root().state_dict(), file)
    with torch.device("meta"):
        bare = Root()
    # With a budget of its own it has books of its own, which go with it.
    opened: Any = diskoffload.open_checkpoint(
        file, model=bare, offload_dir=offload, max_memory=max_bytes
    )
    for (_, mine), (_, theirs) in zip(
        opened.named_parameters(), Root().named_parameters(), strict=True
    ):
        mine.requires_grad_(theirs.requires_grad)
    return opened
