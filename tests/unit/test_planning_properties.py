"""What holds for every plan, whatever the modules and budgets."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from diskoffload.errors import BudgetError
from diskoffload.planning import ModuleSize, Plan, plan_dispatch

GIB = 1 << 30

SIZES = st.lists(st.integers(0, 40), max_size=12)
BUDGET = st.integers(0, 200)
DEVICES = st.lists(BUDGET, min_size=1, max_size=3).map(
    lambda budgets: {f"cuda:{index}": size for index, size in enumerate(budgets)}
)
ANY_DEVICES = DEVICES | BUDGET.map(lambda size: {"cpu": size})


def untied(*sizes: int) -> list[ModuleSize]:
    return [ModuleSize(f"m{index}", size) for index, size in enumerate(sizes)]


def tied(*modules: dict[int, int]) -> list[ModuleSize]:
    return [
        ModuleSize(f"m{index}", sum(tensors.values()), tuple(tensors.items()))
        for index, tensors in enumerate(modules)
    ]


@st.composite
def module_lists(draw: st.DrawFn) -> list[ModuleSize]:
    """Modules over a pool of tensors: some their own, some tied, some of no bytes."""
    pool = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10))
    ids = st.sets(st.integers(0, len(pool) - 1), max_size=3)
    return tied(*({t: pool[t] for t in chosen} for chosen in draw(st.lists(ids, max_size=10))))


def union_bytes(sizes: list[ModuleSize], names: set[str]) -> int:
    """Add up the distinct tensors of the modules named: the test's own account."""
    return sum({t: n for s in sizes if s.name in names for t, n in s.tensors}.values())


def planned(
    sizes: list[ModuleSize], devices: dict[str, int], cpu_bytes: int | None, extra_bytes: int
) -> Plan:
    try:
        return plan_dispatch(sizes, devices, cpu_bytes, extra_bytes=extra_bytes)
    except BudgetError:
        # Refused only where the largest module truly has no place.
        largest_bytes = max(module.size_bytes for module in sizes)
        assert "cpu" not in devices
        assert all(largest_bytes + extra_bytes > budget for budget in devices.values())
        assume(False)
        raise


@given(module_lists(), ANY_DEVICES, BUDGET | st.none(), st.integers(0, 50))
def test_every_module_once_in_order_within_every_budget(
    sizes: list[ModuleSize], devices: dict[str, int], cpu_bytes: int | None, extra_bytes: int
) -> None:
    plan = planned(sizes, devices, cpu_bytes, extra_bytes)
    assert [entry.name for entry in plan.entries] == [module.name for module in sizes]
    assert [entry.size_bytes for entry in plan.entries] == [module.size_bytes for module in sizes]

    at: dict[str, set[str]] = {}
    for entry in plan.entries:
        at.setdefault(entry.offload_device, set()).add(entry.name)
        assert entry.onload_device in devices
        assert entry.offload_device in {entry.onload_device, "cpu", "disk"}
    counted = {place: union_bytes(sizes, names) for place, names in at.items()}
    assert plan.bytes_by_place() == counted

    for device, budget in devices.items():
        stays = counted.get(device, 0)
        # A device whose modules have no bytes may be smaller than the room for activations.
        assert stays == 0 or stays + plan.extra_bytes <= budget
        comes = [
            entry.size_bytes
            for entry in plan.entries
            if entry.onload_device == device != entry.offload_device
        ]
        if comes and device != "cpu":
            assert stays + max(comes) + extra_bytes <= budget
    if cpu_bytes is not None:
        assert counted.get("cpu", 0) <= cpu_bytes
    # Devices are used one after the other, and only the last one in use onloads.
    used = [list(devices).index(entry.onload_device) for entry in plan.entries]
    assert used == sorted(used)
    for entry in plan.entries:
        if entry.onload_device != entry.offload_device:
            assert entry.onload_device == plan.entries[-1].onload_device
    assert plan.extra_bytes >= extra_bytes


def can_fit(sizes: list[ModuleSize], devices: dict[str, int], extra_bytes: int) -> bool:
    """Try every way to cut the modules, in order, into one run for each device."""
    reached = {0}
    for budget in devices.values():
        reached |= {
            stop
            for start in reached
            for stop in range(start + 1, len(sizes) + 1)
            if union_bytes(sizes, {s.name for s in sizes[start:stop]}) + extra_bytes <= budget
        }
    return len(sizes) in reached


@given(module_lists(), DEVICES, st.integers(0, 50))
def test_all_stays_wherever_it_can_with_the_largest_room(
    sizes: list[ModuleSize], devices: dict[str, int], extra_bytes: int
) -> None:
    assume(sizes)
    plan = planned(sizes, devices, None, extra_bytes)
    rooms = range(extra_bytes, max(extra_bytes, min(devices.values())) + 1)
    enough = [room for room in rooms if can_fit(sizes, devices, room)]
    assert plan.extra_bytes == max(enough, default=extra_bytes)
    if enough:
        assert all(entry.onload_device == entry.offload_device for entry in plan.entries)


@given(module_lists(), DEVICES, BUDGET, st.integers(0, 60), st.integers(0, 50))
def test_more_ram_never_puts_more_on_disk(
    sizes: list[ModuleSize], devices: dict[str, int], cpu_bytes: int, more: int, extra_bytes: int
) -> None:
    less = planned(sizes, devices, cpu_bytes, extra_bytes).bytes_by_place()
    plenty = planned(sizes, devices, cpu_bytes + more, extra_bytes).bytes_by_place()
    assert plenty.get("cpu", 0) >= less.get("cpu", 0)
    assert {k: v for k, v in plenty.items() if k in devices} == {
        k: v for k, v in less.items() if k in devices
    }


@given(module_lists(), st.sampled_from(["cpu", "cuda:0"]), BUDGET, st.integers(0, 60), SIZES)
def test_a_larger_device_never_keeps_less(
    sizes: list[ModuleSize], device: str, budget: int, more: int, extra: list[int]
) -> None:
    extra_bytes = sum(extra[:1])
    less = planned(sizes, {device: budget}, None, extra_bytes)
    plenty = planned(sizes, {device: budget + more}, None, extra_bytes)
    assert plenty.bytes_by_place().get(device, 0) >= less.bytes_by_place().get(device, 0)
    assert plenty.extra_bytes >= less.extra_bytes


@given(module_lists(), DEVICES, st.integers(0, 50), st.data())
def test_what_fits_still_fits_when_any_device_grows(
    sizes: list[ModuleSize], devices: dict[str, int], extra_bytes: int, data: st.DataObject
) -> None:
    plan = planned(sizes, devices, None, extra_bytes)
    assume(all(entry.onload_device == entry.offload_device for entry in plan.entries))
    larger = {name: size + data.draw(st.integers(0, 30)) for name, size in devices.items()}
    grown = plan_dispatch(sizes, larger, None, extra_bytes=extra_bytes)
    assert all(entry.onload_device == entry.offload_device for entry in grown.entries)


@given(SIZES, DEVICES, BUDGET, st.integers(0, 50))
def test_tensors_that_nobody_shares_change_nothing(
    amounts: list[int], devices: dict[str, int], cpu_bytes: int, extra_bytes: int
) -> None:
    assume(amounts)
    spelled = tied(*({index: size} for index, size in enumerate(amounts)))
    plan = planned(untied(*amounts), devices, cpu_bytes, extra_bytes)
    assert plan == plan_dispatch(spelled, devices, cpu_bytes, extra_bytes=extra_bytes)


def test_the_room_is_found_to_the_byte_for_many_modules() -> None:
    sizes = [ModuleSize(f"m{index}", 1 << 20, ((index, 1 << 20),)) for index in range(10_000)]
    plan = plan_dispatch(sizes, {"cuda:0": 64 * GIB, "cuda:1": 64 * GIB}, None, extra_bytes=GIB)
    assert plan.extra_bytes == 64 * GIB - 5_000 * (1 << 20)
