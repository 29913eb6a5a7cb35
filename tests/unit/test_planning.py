"""Placements by example, and how a plan shows them."""

from __future__ import annotations

import json

import pytest
import torch

from diskoffload.errors import BudgetError, InvalidInputError
from diskoffload.planning import ModuleSize, Plan, plan_dispatch

GIB = 1 << 30


def untied(*sizes: int) -> list[ModuleSize]:
    return [ModuleSize(f"m{index}", size) for index, size in enumerate(sizes)]


def tied(*modules: dict[int, int]) -> list[ModuleSize]:
    return [
        ModuleSize(f"m{index}", sum(tensors.values()), tuple(tensors.items()))
        for index, tensors in enumerate(modules)
    ]


def pairs(plan: Plan) -> list[tuple[str, str]]:
    return [(entry.onload_device, entry.offload_device) for entry in plan.entries]


def test_everything_fits_with_the_largest_room_for_activations() -> None:
    plan = plan_dispatch(untied(10, 20, 30), {"cuda:0": 40, "cuda:1": 50}, 0, extra_bytes=1)
    # With 11 free on each, 10 and 20 no longer share the first device, nor 20 and 30 the second.
    assert pairs(plan) == [("cuda:0", "cuda:0")] * 2 + [("cuda:1", "cuda:1")]
    assert plan.extra_bytes == 10
    assert "cuda:0 and cuda:1" in plan.reason
    assert "10 B" in plan.reason


def test_overflow_goes_to_ram_then_to_disk_and_is_onloaded_to_the_last_device() -> None:
    plan = plan_dispatch(untied(10, 10, 10, 10, 10), {"cuda:0": 25}, 15, extra_bytes=3)
    assert pairs(plan) == [
        ("cuda:0", "cuda:0"),
        ("cuda:0", "cpu"),  # popped: 10 kept + 10 at work + 3 is within 25, 20 + 10 + 3 not
        ("cuda:0", "disk"),
        ("cuda:0", "disk"),
        ("cuda:0", "disk"),
    ]
    assert plan.bytes_by_place() == {"cuda:0": 10, "cpu": 10, "disk": 30}
    assert plan.extra_bytes == 3


def test_a_module_larger_than_ram_does_not_keep_smaller_ones_out_of_it() -> None:
    plan = plan_dispatch(untied(50, 5, 5), {"cuda:0": 52}, 10, extra_bytes=0)
    assert pairs(plan) == [("cuda:0", "disk"), ("cuda:0", "cpu"), ("cuda:0", "cpu")]


def test_without_a_bound_on_ram_nothing_goes_to_disk() -> None:
    plan = plan_dispatch(untied(*[10] * 50), {"cuda:0": 20}, None, extra_bytes=0)
    assert set(pairs(plan)) == {("cuda:0", "cuda:0"), ("cuda:0", "cpu")}


def test_on_the_cpu_alone_what_fits_stays_and_the_rest_lies_on_disk() -> None:
    plan = plan_dispatch(untied(10, 10, 10, 10, 1), {"cpu": 24}, 24, extra_bytes=2)
    assert pairs(plan) == [("cpu", "cpu")] * 2 + [("cpu", "disk")] * 2 + [("cpu", "cpu")]
    assert plan.bytes_by_place() == {"cpu": 21, "disk": 20}


def test_on_the_cpu_alone_no_module_is_too_large() -> None:
    plan = plan_dispatch(untied(10, 10), {"cpu": 0}, None, extra_bytes=5)
    assert pairs(plan) == [("cpu", "disk")] * 2
    assert "on disk" in plan.reason


def test_on_the_cpu_alone_the_smaller_bound_counts() -> None:
    sizes = untied(10, 10, 10)
    assert plan_dispatch(sizes, {"cpu": 30}, 15, extra_bytes=0).bytes_by_place()["cpu"] == 10
    assert plan_dispatch(sizes, {"cpu": 15}, 30, extra_bytes=0).bytes_by_place()["cpu"] == 10


def test_a_cpu_among_the_devices_shares_its_ram_with_what_is_offloaded() -> None:
    plan = plan_dispatch(untied(10, 10, 50), {"cuda:0": 50, "cpu": 15}, 45, extra_bytes=0)
    # 50 fits beside nothing on either, so all of cuda:0 is its place; 15 bounds the RAM.
    assert pairs(plan) == [("cuda:0", "cpu"), ("cuda:0", "disk"), ("cuda:0", "disk")]
    plan = plan_dispatch(untied(20, 15, 12), {"cpu": 30, "cuda:0": 20}, None, extra_bytes=0)
    assert pairs(plan) == [("cpu", "cpu"), ("cuda:0", "disk"), ("cuda:0", "disk")]


def test_a_module_that_no_device_can_hold_is_named() -> None:
    sizes = [ModuleSize("small", 1), ModuleSize("model.embed_tokens", 5 * GIB)]
    with pytest.raises(BudgetError) as caught:
        plan_dispatch(sizes, {"cuda:0": 2 * GIB, "cuda:1": 5 * GIB}, None, extra_bytes=4)
    for part in ["model.embed_tokens", "5.00 GiB", "cuda:0: 2.00 GiB", "4 B", "no_split_modules"]:
        assert part in str(caught.value)


def test_the_disk_has_a_budget_too() -> None:
    sizes = untied(10, 10, 10)
    assert plan_dispatch(sizes, {"cpu": 10}, 10, extra_bytes=0, disk_bytes=20).entries
    with pytest.raises(BudgetError, match="20 B would lie on disk"):
        plan_dispatch(sizes, {"cpu": 10}, 10, extra_bytes=0, disk_bytes=19)


def test_a_tie_is_counted_once_where_it_stays() -> None:
    sizes = tied({1: 100}, {2: 10}, {1: 100, 3: 5})
    plan = plan_dispatch(sizes, {"cuda:0": 115}, 0, extra_bytes=0)
    assert set(pairs(plan)) == {("cuda:0", "cuda:0")}
    assert plan.bytes_by_place() == {"cuda:0": 115}
    assert [entry.size_bytes for entry in plan.entries] == [100, 10, 105]
    assert [entry.added_bytes for entry in plan.entries] == [100, 10, 5]
    with pytest.raises(BudgetError):
        plan_dispatch(untied(100, 10, 105), {"cuda:0": 104}, 0, extra_bytes=0)


def test_a_tie_is_counted_in_each_place_that_holds_it() -> None:
    plan = plan_dispatch(tied({1: 10}, {2: 10}, {1: 10}), {"a": 15, "b": 25}, 0, extra_bytes=0)
    assert pairs(plan) == [("a", "a"), ("b", "b"), ("b", "b")]
    assert plan.bytes_by_place() == {"a": 10, "b": 20}


def test_a_tied_head_stays_with_its_embedding_and_no_room_is_kept_for_it() -> None:
    layers = [{index: 10} for index in range(2, 8)]
    plan = plan_dispatch(tied({1: 50}, *layers, {1: 50}), {"cuda:0": 75}, 20, extra_bytes=0)
    assert pairs(plan)[0] == pairs(plan)[-1] == ("cuda:0", "cuda:0")
    assert plan.bytes_by_place() == {"cuda:0": 60, "cpu": 20, "disk": 30}


def test_a_tied_head_counts_again_once_what_it_shares_has_left() -> None:
    # 20 do not fit beside 50 and 30, so 30 leave; with them the head no longer lies there as a
    # whole, and when its 80 are onloaded nothing fits beside them.
    sizes = tied({1: 50}, {3: 30}, {2: 20}, {1: 50, 3: 30})
    plan = plan_dispatch(sizes, {"cuda:0": 85}, 80, extra_bytes=0)
    assert [offload for _, offload in pairs(plan)] == ["cpu", "cpu", "disk", "cpu"]
    with pytest.raises(BudgetError, match="m3"):
        plan_dispatch(sizes, {"cuda:0": 79}, 80, extra_bytes=0)


def test_a_tied_head_needs_no_room_on_the_device_of_its_embedding() -> None:
    # b is too small for 40; on a the head's 50 lie already, so 45 is the largest to come.
    sizes = tied({1: 50}, {5: 45}, {2: 25}, {4: 40}, {1: 50})
    plan = plan_dispatch(sizes, {"a": 98, "b": 30}, None, extra_bytes=0)
    assert pairs(plan) == [("a", "a"), *[("a", "cpu")] * 3, ("a", "a")]


def test_a_tie_in_ram_costs_nothing_more_there() -> None:
    sizes = tied({1: 30}, {2: 20}, {1: 30})
    plan = plan_dispatch(sizes, {"cpu": 30}, 30, extra_bytes=0)
    assert pairs(plan) == [("cpu", "cpu"), ("cpu", "disk"), ("cpu", "cpu")]
    plan = plan_dispatch(sizes, {"cuda:0": 31}, 30, extra_bytes=1)
    assert pairs(plan) == [("cuda:0", "cpu"), ("cuda:0", "disk"), ("cuda:0", "cpu")]


def test_more_room_than_the_smallest_device_is_no_error_while_all_fits() -> None:
    plan = plan_dispatch(untied(10, 10), {"cuda:0": 5, "cuda:1": 100}, 0, extra_bytes=50)
    assert pairs(plan) == [("cuda:1", "cuda:1")] * 2
    assert plan.extra_bytes == 50


def test_nothing_to_place() -> None:
    plan = plan_dispatch([], {"cpu": 10}, 10, extra_bytes=0)
    assert plan.entries == ()
    assert plan.bytes_by_place() == {}
    assert plan.device_map() == {}
    assert "nothing" in str(plan)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (untied(1), {}, "at least one device"),
        (untied(1), {"disk": 5}, "disk"),
        (untied(1), {"cuda:0": -1}, "-1"),
        (untied(1), {"cuda:0": 1, torch.device("cuda", 0): 1}, "twice"),
        (untied(1) + untied(1), {"cuda:0": 1}, "'m0' is listed twice"),
        (tied({1: 5}, {1: 6}), {"cuda:0": 1}, "id 1 in module 'm1' has 6"),
    ],
)
def test_refuses_what_cannot_be_meant(
    sizes: list[ModuleSize], devices: dict[str | torch.device, int], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        plan_dispatch(sizes, devices, None, extra_bytes=0)


@pytest.mark.parametrize(
    "budgets",
    [{"cpu": -1, "extra": 0}, {"cpu": 0, "extra": -1}, {"cpu": 0, "extra": 0, "disk": -1}],
)
def test_refuses_negative_budgets(budgets: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="-1 bytes"):
        plan_dispatch(
            untied(1),
            {"a": 1},
            budgets["cpu"],
            extra_bytes=budgets["extra"],
            disk_bytes=budgets.get("disk"),
        )


@pytest.mark.parametrize(("size", "tensors"), [(-1, ()), (5, ((1, 4),)), (0, ((1, -1), (2, 1)))])
def test_a_module_size_must_add_up(size: int, tensors: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InvalidInputError, match="'odd'"):
        ModuleSize("odd", size, tensors)


def test_a_tensor_registered_twice_in_one_module_counts_once() -> None:
    module = ModuleSize("m", 7, ((1, 7), (1, 7)))
    assert plan_dispatch([module], {"a": 7}, 0, extra_bytes=0).bytes_by_place() == {"a": 7}


# --- What a plan shows ---------------------------------------------------------------------


def test_a_plan_of_400_modules_prints_as_a_short_table() -> None:
    sizes = [ModuleSize("", GIB)]
    sizes += [ModuleSize(f"model.layers.{index}", GIB // 4) for index in range(400)]
    plan = plan_dispatch(sizes, {"cuda:0": 21 * GIB}, 10 * GIB, extra_bytes=GIB)
    assert str(plan).splitlines() == [
        "onload  offload  modules      size  names",
        "cuda:0  cuda:0        76  19.8 GiB  (root) .. model.layers.74",
        "cuda:0  cpu           40  10.0 GiB  model.layers.75 .. model.layers.114",
        "cuda:0  disk         285  71.2 GiB  model.layers.115 .. model.layers.399",
        "total                401   101 GiB",
        "room for activations: 1.00 GiB",
        "401 modules (101 GiB) and 1.00 GiB for activations exceed the budget (cuda:0: 21.0 GiB),"
        " so 19.8 GiB stays on cuda:0, 10.0 GiB lies in RAM, 71.2 GiB lies on disk until cuda:0"
        " needs it",
    ]


def test_a_plan_that_alternates_prints_a_short_table_too() -> None:
    plan = plan_dispatch(untied(*[100, 1] * 200), {"cpu": 90}, None, extra_bytes=0)
    assert str(plan).splitlines()[:4] == [
        "onload  offload  modules      size  names",
        "cpu     disk         310  19.6 KiB  m0 .. m399, interleaved",
        "cpu     cpu           90      90 B  m1 .. m179, interleaved",
        "total                400  19.7 KiB",
    ]


def test_a_plan_as_json_and_as_a_map() -> None:
    plan = plan_dispatch(untied(10, 10, 5), {"cuda:0": 20}, 10, extra_bytes=0)
    found = json.loads(json.dumps(plan.as_json()))
    assert found["bytes_by_place"] == plan.bytes_by_place()
    assert found["extra_bytes"] == 0
    assert found["reason"] == plan.reason
    assert found["entries"][1] == {
        "name": "m1",
        "onload_device": "cuda:0",
        "offload_device": "cpu",
        "size_bytes": 10,
        "added_bytes": 10,
    }
    assert plan.device_map() == {
        "m0": ("cuda:0", "cuda:0"),
        "m1": ("cuda:0", "cpu"),
        "m2": ("cuda:0", "disk"),
    }


def test_a_plan_cannot_be_changed() -> None:
    plan = plan_dispatch(untied(1), {"a": 1}, 0, extra_bytes=0)
    with pytest.raises(AttributeError):
        plan.extra_bytes = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan.entries[0].name = "other"  # type: ignore[misc]
