"""Bytes of elements are split into planes and joined again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diskoffload.store.planes import ELEMENT_SIZES, join, split
from diskoffload.store.workspace import Bytes, Workspace

COUNTS = [0, 1, 3, 65, 131_072, 262_145, 1_048_576, 1_048_577]


def random_bytes(count: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("size", ELEMENT_SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_a_plane_has_one_byte_of_every_element(size: int, count: int) -> None:
    data = random_bytes(count * size)
    planes = [np.empty(count, np.uint8) for _ in range(size)]
    split(data, planes, Workspace())
    for number, plane in enumerate(planes):
        assert np.array_equal(plane, data[number::size])


@pytest.mark.parametrize("size", ELEMENT_SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_planes_are_joined_to_what_they_were(size: int, count: int) -> None:
    data = random_bytes(count * size)
    planes = [data[number::size].copy() for number in range(size)]
    target = np.empty_like(data)
    workspace = Workspace()
    for _ in range(2):  # with the same workspace again
        target.fill(0)
        join(planes, target, workspace)
        assert np.array_equal(target, data)


@pytest.mark.parametrize("size", ELEMENT_SIZES)
def test_a_number_stands_for_a_plane_of_it(size: int) -> None:
    """Of all planes each may be constant or not, and the constant zero or not."""
    count = 1_048_576 // size + 7
    for constants in itertools.product([None, 0, 255], repeat=min(size, 4)):
        chosen = (*constants, *constants)[:size]
        planes: list[Bytes | int] = [
            random_bytes(count, number) if constant is None else constant
            for number, constant in enumerate(chosen)
        ]
        target = np.empty(count * size, np.uint8)
        join(planes, target, Workspace())
        for number, plane in enumerate(planes):
            assert (target[number::size] == plane).all(), chosen


def test_elements_may_lie_at_any_address() -> None:
    data = random_bytes(4 * 1000)
    memory = np.empty(4 * 1000 + 1, np.uint8)
    join([data[number::4].copy() for number in range(4)], memory[1:], Workspace())
    assert np.array_equal(memory[1:], data)
