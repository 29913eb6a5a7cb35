"""Mixed work for a while: what it takes of the system does not grow."""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commit_cases import bare, check_values, seeded, values

import diskoffload
from diskoffload.residency.resident import Residency
from diskoffload.system.memory import anonymous_bytes_of_process


class Taken(NamedTuple):
    """What the process and its folder take of the system."""

    files: int
    disk_bytes: int
    mappings: int
    descriptors: int
    anonymous_bytes: int


def taken(folder: Path) -> Taken:
    gc.collect()
    files = [path.stat().st_size for path in folder.iterdir()]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mappings = sum(1 for _ in maps)
    anonymous = anonymous_bytes_of_process()
    assert anonymous is not None
    return Taken(len(files), sum(files), mappings, len(os.listdir("/proc/self/fd")), anonymous)


@torch.no_grad()
def one_step(net: Any, number: int, choose: random.Random, residency: Residency) -> None:
    part = choose.choice([net.up, net.down, net.norm, net.embed])
    action = choose.randrange(9)
    if action == 0:
        part.weight.add_(1)
    elif action == 1:
        diskoffload.update_offload_parameter(part, "weight", torch.tensor(float(number)))
    elif action == 2:
        part.weight = torch.nn.Parameter(part.weight.detach().clone())
    elif action == 3:
        net.register_buffer("extra", torch.full((choose.randrange(1, 500),), float(number)))
    elif action == 4:
        net.norm.running_mean.data.mul_(0.5)
    elif action == 5:
        diskoffload.commit(net, note=number)
    elif action == 6:
        residency.make_room(1 << 60)
    elif action == 7:
        twin = copy.deepcopy(net)
        twin.up.weight.zero_()
    else:
        with diskoffload.disable_offloading():
            values(net)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "seconds",
    [pytest.param(45, marks=pytest.mark.slow), pytest.param(240, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_nothing_grows(compression: str | None, seconds: int, tmp_path: Path) -> None:
    net: Any = seeded()
    residency = Residency()
    for name, module in net.named_modules():
        diskoffload.offload_module(
            module,
            "cpu",
            "disk",
            offload_dir=tmp_path / "off",
            name=name,
            residency=residency,
            compression=compression,
        )
    choose = random.Random(0)
    seen: list[Taken] = []
    number, steps_each = 0, 150
    end_seconds = time.monotonic() + seconds
    while time.monotonic() < end_seconds or len(seen) < 6:
        for _ in range(steps_each):
            number += 1
            one_step(net, number, choose, residency)
        diskoffload.commit(net, note=number)
        residency.make_room(1 << 60)
        seen.append(taken(tmp_path / "off"))
    half = len(seen) // 2
    early = Taken(*map(max, zip(*seen[:half], strict=True)))
    late = Taken(*map(max, zip(*seen[half:], strict=True)))
    assert late.files <= early.files + 10, (early, late)
    assert late.disk_bytes <= early.disk_bytes * 1.5 + (256 << 10), (early, late)
    assert late.mappings <= early.mappings + 16, (early, late)
    assert late.descriptors <= early.descriptors + 2, (early, late)
    assert late.anonymous_bytes <= early.anonymous_bytes + (16 << 20), (early, late)
    expected = values(net)
    del net, module
    gc.collect()
    again: Any = bare()
    again = diskoffload.reopen(tmp_path / "off", model=again, verify="full")
    check_values(again, expected)
