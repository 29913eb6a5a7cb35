"""Amounts of memory as people write them, and ``max_memory``."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diskoffload.errors import InvalidInputError
from diskoffload.planning import MemoryBudget, format_bytes, parse_bytes, parse_max_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (123, 123),
        (1e9, 10**9),
        (1.9, 1),
        ("0", 0),
        ("100_000", 100_000),
        ("12 B", 12),
        ("8GB", 8 * 10**9),
        ("20GiB", 20 * 2**30),
        (" 512 MiB\n", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.1gib", 107374182),
        ("3kb", 3000),
        ("3 KiB", 3072),
        ("2TB", 2 * 10**12),
        ("2tib", 2**41),
        ("1PiB", 2**50),
        ("2.01GB", 2_010_000_000),  # floating point would make it a byte less
    ],
)
def test_parse_bytes(value: int | float | str, expected: int) -> None:
    assert parse_bytes(value) == expected
    assert type(parse_bytes(value)) is int


@pytest.mark.parametrize(
    "value",
    [-1, -0.5, float("nan"), float("inf"), True, None, b"1GB", "", "GB", "8G", "8 gigabytes"]
    + ["-1GB", "1,000", "1e9", "1.2.3GB", ".5GB", "1._5GB", "1__0", "_1", "8GB free", "9" * 5000]
    + ["٣GB"],
)
def test_parse_bytes_refuses(value: object) -> None:
    with pytest.raises(InvalidInputError, match="MiB"):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (312 << 20, "312 MiB"),
        (10239, "10.0 KiB"),  # not 10.00
        (GIB - 1, "1.00 GiB"),  # not 1024 MiB
        (12345 * 2**50, "12345 PiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(size: int, expected: str) -> None:
    assert format_bytes(size) == expected


@given(st.integers(0, 2**55))
def test_what_is_formatted_reads_back_within_half_a_percent(size: int) -> None:
    dropped = 1  # a fraction of a byte, in reading
    assert abs(parse_bytes(format_bytes(size)) - size) <= Fraction(size, 200) + dropped


# --- max_memory ----------------------------------------------------------------------------

TWO = ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("max_memory", "accelerators", "expected"),
    [
        ({0: "20GiB", "cpu": "8GiB"}, TWO, MemoryBudget({"cuda:0": 20 * GIB}, 8 * GIB)),
        ({"cuda:1": 5, 0: 7}, TWO, MemoryBudget({"cuda:1": 5, "cuda:0": 7}, None)),
        ({"cuda": 5, "1": 7, "disk": 9}, TWO, MemoryBudget({"cuda:0": 5, "cuda:1": 7}, None, 9)),
        ({torch.device("cuda", 1): 5}, TWO, MemoryBudget({"cuda:1": 5}, None)),
        ({torch.device("cpu"): 5}, [], MemoryBudget({"cpu": 5}, 5)),
        ({"cpu": "1KiB", "disk": 0}, TWO, MemoryBudget({"cpu": 1024}, 1024, 0)),
        ({}, TWO, MemoryBudget({}, None)),
        ({"disk": 3}, [], MemoryBudget({}, None, 3)),
    ],
)
def test_max_memory(
    max_memory: dict[object, int], accelerators: list[str], expected: MemoryBudget
) -> None:
    found = parse_max_memory(max_memory, accelerators=accelerators)
    assert found == expected
    assert list(found.devices) == list(expected.devices)


@pytest.mark.parametrize("key", [2, -1, "cuda:2", "xpu", "", "gpu0", True, None, 0.0, "meta"])
def test_max_memory_names_an_unknown_key_and_what_there_is(key: object) -> None:
    with pytest.raises(InvalidInputError, match="max_memory") as caught:
        parse_max_memory({key: 1}, accelerators=TWO)
    assert repr(key) in str(caught.value)
    assert "'cuda:1'" in str(caught.value)


def test_max_memory_refuses_an_index_where_there_is_no_accelerator() -> None:
    with pytest.raises(InvalidInputError, match="no device of this machine"):
        parse_max_memory({0: "20GiB", "cpu": "8GiB"}, accelerators=[])


def test_max_memory_refuses_a_device_named_twice_and_a_bad_amount() -> None:
    with pytest.raises(InvalidInputError, match="twice"):
        parse_max_memory({0: 1, "cuda:0": 1}, accelerators=TWO)
    with pytest.raises(InvalidInputError, match="lots"):
        parse_max_memory({"cpu": "lots"}, accelerators=TWO)
