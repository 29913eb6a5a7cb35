"""compressed-tensors as an independent oracle: the same inputs, the same placement."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from diskoffload.errors import BudgetError
from diskoffload.planning import ModuleSize, Plan, plan_dispatch

AMOUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
DEVICES = st.lists(st.integers(0, 200), min_size=1, max_size=3).map(
    lambda budgets: {f"cuda:{index}": size for index, size in enumerate(budgets)}
)


def untied(*sizes: int) -> list[ModuleSize]:
    return [ModuleSize(f"m{index}", size) for index, size in enumerate(sizes)]


def pairs(plan: Plan) -> list[tuple[str, str]]:
    return [(entry.onload_device, entry.offload_device) for entry in plan.entries]


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle here")
    module: ModuleType = pytest.importorskip(
        "compressed_tensors.offload.dispatch", reason="this compressed-tensors cannot dispatch"
    )
    return module


def peer_dispatch(
    peer: ModuleType, sizes: list[int], devices: dict[str, int], extra_bytes: int
) -> dict[str, tuple[str, str]]:
    """Let compressed-tensors dispatch a real model; only what moves tensors is recorded instead."""
    model = torch.nn.Sequential(*(torch.nn.Module() for _ in sizes))
    for layer, size in zip(model, sizes, strict=True):
        layer.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device="meta"))
    recorded: dict[torch.nn.Module, tuple[str, str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "remove_module_offload", lambda *_, **__: None)
        patch.setattr(
            peer,
            "offload_module",
            lambda layer, onload, offload: recorded.update({layer: (str(onload), str(offload))}),
        )
        memory = {torch.device(name): size for name, size in devices.items()}
        peer.dispatch_model(model, memory, extra_bytes, ())
    return {f"m{name}": recorded[layer] for name, layer in model.named_children()}


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(AMOUNTS, DEVICES, st.integers(0, 50))
@example([5, 90, 90], {"cuda:0": 10, "cuda:1": 100}, 0)
@example([60, 40, 5, 70], {"cuda:0": 100, "cuda:1": 10}, 0)
def test_places_as_compressed_tensors_does_where_no_disk_is_involved(
    peer: ModuleType, sizes: list[int], devices: dict[str, int], extra_bytes: int
) -> None:
    try:
        expected = peer_dispatch(peer, sizes, devices, extra_bytes)
    except ValueError:
        with pytest.raises(BudgetError):
            plan_dispatch(untied(*sizes), devices, None, extra_bytes=extra_bytes)
        return
    except AssertionError:
        # It trips over its own check where all fits with more room than the smallest device.
        assert extra_bytes > min(devices.values())
        return
    plan = plan_dispatch(untied(*sizes), devices, None, extra_bytes=extra_bytes)
    assert plan.device_map() == expected


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(AMOUNTS, DEVICES, st.integers(0, 50))
def test_finds_the_same_room_as_compressed_tensors(
    peer: ModuleType, sizes: list[int], devices: dict[str, int], extra_bytes: int
) -> None:
    modules = list(enumerate(sizes))
    try:
        room, (dispatch, _) = peer.max_binary_search(
            fn=lambda extra: peer._get_greedy_dispatch(modules, devices, extra),
            cond=lambda result: len(result[0]) == len(sizes),
            start=extra_bytes,
            end=min(devices.values()),
        )
    except peer.SearchFailureError:
        assume(False)
        raise
    plan = plan_dispatch(untied(*sizes), devices, None, extra_bytes=extra_bytes)
    assert plan.extra_bytes == room
    assert pairs(plan) == [(onload, offload) for _, onload, offload in dispatch]


def test_the_oracle_is_asked_in_every_situation(peer: ModuleType) -> None:
    """All fit, some are popped, none can fit: the random inputs above mean nothing without."""
    fits = peer_dispatch(peer, [10, 10], {"cuda:0": 20}, 0)
    popped = peer_dispatch(peer, [10, 10, 10], {"cuda:0": 20}, 0)
    assert set(fits.values()) == {("cuda:0", "cuda:0")}
    assert [offload for _, offload in popped.values()] == ["cuda:0", "cpu", "cpu"]
    with pytest.raises(ValueError, match="Cannot fit"):
        peer_dispatch(peer, [10, 30], {"cuda:0": 20}, 0)
