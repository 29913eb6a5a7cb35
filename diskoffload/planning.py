"""Module sizes and budgets in, a device map out. Pure: nothing is asked, moved or opened.

:func:`parse_max_memory` reads what a user wrote, :func:`plan_dispatch` decides what runs and
what lies where, and :class:`Plan` shows the decision before anything is carried out.
Everything is immutable or local to a call, so every function may run in any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diskoffload.budget import (
    CPU,
    DISK,
    MemoryBudget,
    format_bytes,
    parse_bytes,
    parse_max_memory,
)
from diskoffload.errors import BudgetError, InvalidInputError
from diskoffload.plan import Placement, Plan, describe_budgets, describe_choice

__all__ = [
    "MemoryBudget",
    "ModuleSize",
    "Placement",
    "Plan",
    "format_bytes",
    "parse_bytes",
    "parse_max_memory",
    "plan_dispatch",
]


@dataclass(frozen=True)
class ModuleSize:
    """A module that is placed as a whole.

    Attributes:
        name: its name in the model; ``""`` is the model itself.
        size_bytes: all its tensors, each counted once.
        tensors: ``(tensor id, bytes)`` of each. Equal ids are one tensor: where the modules
            of a tie lie in one place, it is counted there once. An id is any integer, the
            same for the same tensor in every module. Empty if nothing is shared.

    Raises:
        InvalidInputError: a negative size, or tensors that do not add up to ``size_bytes``.
    """

    name: str
    size_bytes: int
    tensors: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        distinct = dict(self.tensors)
        smallest = min(self.size_bytes, *distinct.values(), 0)
        if smallest < 0 or (distinct and sum(distinct.values()) != self.size_bytes):
            raise InvalidInputError(
                f"module {self.name!r} was given {self.size_bytes} bytes and tensors of "
                f"{sum(distinct.values())} bytes; sizes are not negative, and size_bytes is "
                "the sum over the distinct tensors"
            )


class _Load(NamedTuple):
    """A module as the search sees it: what it weighs alone, and beside the others."""

    size_bytes: int
    private_bytes: int
    shared: tuple[tuple[int, int], ...]


class _Place:
    """Bytes in one place; a shared tensor weighs once, as long as any holder is there."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._holders: Counter[int] = Counter()

    def cost_bytes(self, load: _Load) -> int:
        """Return what adding the module would add."""
        cost_bytes = load.private_bytes
        for tensor_id, size_bytes in load.shared:
            if not self._holders[tensor_id]:
                cost_bytes += size_bytes
        return cost_bytes

    def takes(self, cost_bytes: int, extra_bytes: int = 0) -> bool:
        """Tell whether so much can be added with ``extra_bytes`` left over."""
        if self.capacity_bytes is None:
            return True
        return self.used_bytes + cost_bytes + extra_bytes <= self.capacity_bytes

    def add(self, load: _Load) -> int:
        """Place the module here; returns what it added."""
        cost_bytes = self.cost_bytes(load)
        self.used_bytes += cost_bytes
        for tensor_id, _ in load.shared:
            self._holders[tensor_id] += 1
        return cost_bytes

    def remove(self, load: _Load) -> None:
        """Take the module away again."""
        for tensor_id, _ in load.shared:
            self._holders[tensor_id] -= 1
        self.used_bytes -= self.cost_bytes(load)


def plan_dispatch(
    sizes: Sequence[ModuleSize],
    device_bytes: Mapping[Any, int],
    cpu_bytes: int | None,
    *,
    extra_bytes: int,
    disk_bytes: int | None = None,
) -> Plan:
    """Decide where each module runs and where it lies until then.

    Devices are filled one after the other in module order. If everything fits, the room for
    activations is the largest with which it still does, up to the smallest device. If not,
    modules are kept as long as the last device in use has room, beside ``extra_bytes``, for
    the largest module that is not kept; those are onloaded to it and lie in RAM, or on disk
    where RAM has no room. A module whose tensors all stay there anyway (a tie) stays too.

    Where the CPU is the only device, what fits beside ``extra_bytes`` stays and the rest lies
    on disk; the layer at work is mapped and comes on top of the budget, so none is too large.

    Args:
        sizes: the modules in the order in which they run; names are distinct.
        device_bytes: bytes for each device by name (or ``torch.device``), in the order in
            which they are to be filled.
        cpu_bytes: bytes for what lies in RAM; None sets no bound.
        extra_bytes: the least room for activations on each device.
        disk_bytes: bytes for what lies on disk; None sets no bound.

    Raises:
        BudgetError: no device has room for the largest module, or the disk for the rest.
        InvalidInputError: no device, a negative amount, a name given twice, or a tensor id
            with two sizes.
    """
    devices = _check_budgets(device_bytes, cpu_bytes, disk_bytes, extra_bytes)
    loads = _loads(sizes)
    kept, places = _fill(loads, devices, extra_bytes)
    if len(kept) == len(loads):
        extra_bytes = _most_extra(loads, devices, extra_bytes)
        kept, _ = _fill(loads, devices, extra_bytes)
        pairs = [(device, device) for device in kept]
    else:
        onload = _make_room(sizes, loads, kept, places, extra_bytes)
        ram = places.get(CPU, _Place(cpu_bytes))
        pairs = [(device, device) for device in kept]
        pairs += _overflow(loads[len(kept) :], onload, places, ram, extra_bytes)
    entries = _entries(sizes, loads, pairs)
    plan = Plan(entries, extra_bytes, describe_choice(entries, devices, extra_bytes))
    on_disk_bytes = plan.bytes_by_place().get(DISK, 0)
    if disk_bytes is not None and on_disk_bytes > disk_bytes:
        raise BudgetError(
            f"{format_bytes(on_disk_bytes)} would lie on disk, where {format_bytes(disk_bytes)} "
            f"are allowed ({describe_budgets(devices)}); raise one of the budgets"
        )
    return plan


def _check_budgets(
    device_bytes: Mapping[Any, int],
    cpu_bytes: int | None,
    disk_bytes: int | None,
    extra_bytes: int,
) -> dict[str, int]:
    devices = {str(name): size_bytes for name, size_bytes in device_bytes.items()}
    if not devices or DISK in devices:
        raise InvalidInputError(
            f"no plan for the devices {list(devices)}: modules need at least one device to run "
            'on, and the disk is none; on a machine without accelerator give {"cpu": bytes}'
        )
    if len(devices) != len(device_bytes):
        raise InvalidInputError(f"a device is named twice in {list(device_bytes)}; name it once")
    amounts = {**devices, "cpu_bytes": cpu_bytes, "disk_bytes": disk_bytes, "extra": extra_bytes}
    for name, amount in amounts.items():
        if amount is not None and amount < 0:
            raise InvalidInputError(f"the budget for {name} is {amount} bytes; give 0 or more")
    if CPU in devices and cpu_bytes is not None:
        devices[CPU] = min(devices[CPU], cpu_bytes)
    return devices


def _loads(sizes: Sequence[ModuleSize]) -> list[_Load]:
    """Separate what each module shares with others, so that the search need not look again."""
    known_bytes: dict[int, int] = {}
    holders: Counter[int] = Counter()
    names: set[str] = set()
    for module in sizes:
        if module.name in names:
            raise InvalidInputError(f"the module {module.name!r} is listed twice; list it once")
        names.add(module.name)
        for tensor_id, size_bytes in dict(module.tensors).items():
            if known_bytes.setdefault(tensor_id, size_bytes) != size_bytes:
                raise InvalidInputError(
                    f"the tensor with id {tensor_id} in module {module.name!r} has {size_bytes} "
                    f"bytes, elsewhere {known_bytes[tensor_id]}; an id means one tensor"
                )
            holders[tensor_id] += 1
    loads = []
    for module in sizes:
        shared = tuple((t, n) for t, n in dict(module.tensors).items() if holders[t] > 1)
        private_bytes = module.size_bytes - sum(n for _, n in shared)
        loads.append(_Load(module.size_bytes, private_bytes, shared))
    return loads


def _fill(
    loads: Sequence[_Load], devices: Mapping[str, int], extra_bytes: int
) -> tuple[list[str], dict[str, _Place]]:
    """Place modules in order on devices in order, up to the first that fits on none."""
    places = {name: _Place(capacity_bytes) for name, capacity_bytes in devices.items()}
    remaining = iter(places.items())
    device, place = next(remaining)
    kept: list[str] = []
    for load in loads:
        while not place.takes(place.cost_bytes(load), extra_bytes):
            following = next(remaining, None)
            if following is None:
                return kept, places
            device, place = following
        place.add(load)
        kept.append(device)
    return kept, places


def _most_extra(loads: Sequence[_Load], devices: Mapping[str, int], fits_bytes: int) -> int:
    """Find the largest room with which all still fits, knowing one; more room never helps."""
    low, high = fits_bytes, max(fits_bytes, min(devices.values()))
    while low < high:
        middle = (low + high + 1) // 2
        if len(_fill(loads, devices, middle)[0]) == len(loads):
            low = middle
        else:
            high = middle - 1
    return low


def _make_room(
    sizes: Sequence[ModuleSize],
    loads: Sequence[_Load],
    kept: list[str],
    places: Mapping[str, _Place],
    extra_bytes: int,
) -> str:
    """Drop modules from the end of ``kept`` until all others can be onloaded in their turn.

    Returns the device they are onloaded to.
    """
    device = kept[-1] if kept else next(iter(places))
    if list(places) == [CPU]:
        return device
    largest_bytes = _largest(loads[len(kept) :], places[device])
    while not places[device].takes(largest_bytes, extra_bytes):
        if not kept:
            name = max(sizes, key=lambda module: module.size_bytes).name
            budgets = describe_budgets({n: p.capacity_bytes or 0 for n, p in places.items()})
            raise BudgetError(
                f"module {name!r} needs {format_bytes(largest_bytes)} and "
                f"{format_bytes(extra_bytes)} of room for activations, which no device has "
                f"({budgets}); raise a budget, or let the module be split (no_split_modules)"
            )
        before, device = device, kept.pop()
        load = loads[len(kept)]
        places[device].remove(load)
        # A module that shares nothing fitted here beside extra_bytes, and so it still does.
        if load.shared or before != device:
            largest_bytes = _largest(loads[len(kept) :], places[device])
    return device


def _largest(loads: Sequence[_Load], place: _Place) -> int:
    """Return the largest module that does not lie in the place already by way of ties."""
    return max((load.size_bytes for load in loads if place.cost_bytes(load)), default=0)


def _overflow(
    loads: Sequence[_Load],
    onload: str,
    places: Mapping[str, _Place],
    ram: _Place,
    extra_bytes: int,
) -> list[tuple[str, str]]:
    """Find a place for each module that was not kept."""
    pairs = []
    alone = list(places) == [CPU]
    for load in loads:
        stays = places[onload]
        cost_bytes = stays.cost_bytes(load)
        if not cost_bytes or (alone and stays.takes(cost_bytes, extra_bytes)):
            stays.add(load)
            pairs.append((onload, onload))
        elif onload != CPU and ram.takes(ram.cost_bytes(load)):
            ram.add(load)
            pairs.append((onload, CPU))
        else:
            pairs.append((onload, DISK))
    return pairs


def _entries(
    sizes: Sequence[ModuleSize], loads: Sequence[_Load], pairs: Sequence[tuple[str, str]]
) -> tuple[Placement, ...]:
    places = {offload: _Place(None) for _, offload in pairs}
    return tuple(
        Placement(module.name, onload, offload, module.size_bytes, places[offload].add(load))
        for module, load, (onload, offload) in zip(sizes, loads, pairs, strict=True)
    )
