"""Amounts of memory as people write them, and what ``max_memory`` allows. Pure.

Everything is immutable or local to a call, so every function may run in any thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from diskoffload.errors import InvalidInputError

CPU = "cpu"
DISK = "disk"

# Decimal prefixes as in the SI, binary ones as in IEC 80000-13.
_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgtp", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power

_QUANTITY = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
# Python refuses to convert thousands of digits, with an error that is not ours.
_MOST_DIGITS = 40
_INF = float("inf")


def parse_bytes(value: int | float | str) -> int:
    """Return the number of bytes that ``value`` means.

    Args:
        value: bytes as a number, or text such as ``"20GiB"``, ``"8 GB"``, ``"1.5GB"`` or
            ``"100_000"``. Upper and lower case mean the same, and always bytes, not bits. A
            fraction of a byte is dropped.

    Raises:
        InvalidInputError: a negative or infinite number, an unknown unit, or no number. A
            bare ``"8G"`` is refused because tools disagree whether it is 10**9 or 2**30.
    """
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value.strip())
        if match and len(match[1]) <= _MOST_DIGITS and match[2].lower() in _UNITS:
            return int(Fraction(match[1].replace("_", "")) * _UNITS[match[2].lower()])
    elif not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < _INF:
        return int(value)
    raise InvalidInputError(
        f"cannot read {value!r} as a number of bytes; give a whole number of bytes, or text "
        'with a unit: "500MB" (10**6 each), "512MiB" (2**20 each), likewise kB to PB, KiB to PiB'
    )


def format_bytes(n_bytes: int) -> str:
    """Return bytes with a binary unit and three digits: ``"1.50 GiB"``, ``"312 MiB"``."""
    sign, amount = "-" if n_bytes < 0 else "", float(abs(n_bytes))
    if amount < 1024:
        return f"{sign}{abs(n_bytes)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        amount /= 1024
        # What would round to 1024 reads better as 1 of the next unit.
        if amount < 1023.5 or unit == "PiB":
            break
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{sign}{amount:.{digits}f} {unit}"


@dataclass(frozen=True)
class MemoryBudget:
    """What ``max_memory`` allows.

    Attributes:
        devices: bytes for each device that modules run on, in the order they are filled.
            Empty where the CPU is the device and ``max_memory`` does not say how much.
        cpu_bytes: bytes for what lies in RAM; None if not said.
        disk_bytes: bytes for what lies on disk; None if not said.
    """

    devices: dict[str, int]
    cpu_bytes: int | None
    disk_bytes: int | None = None


def parse_max_memory(
    max_memory: Mapping[Any, int | float | str], *, accelerators: Sequence[str]
) -> MemoryBudget:
    """Read a ``max_memory`` such as ``{0: "20GiB", "cpu": "8GiB", "disk": "1TB"}``.

    Only the devices that are named are used, in the order in which they are named. If no
    accelerator is named, or there is none, the CPU is the device, and ``"cpu"`` bounds what
    stays in RAM.

    Args:
        max_memory: amounts as for :func:`parse_bytes`. Keys: an accelerator's index or name
            (text or ``torch.device``; a name without index is the first of its type),
            ``"cpu"``, ``"disk"``.
        accelerators: names of this machine's accelerators by index, such as ``"cuda:0"``.

    Raises:
        InvalidInputError: an unknown key, a device named twice, an amount that is none.
    """
    amounts: dict[str, int] = {}
    for key, value in max_memory.items():
        name = _device_name(key, accelerators)
        if name in amounts:
            raise InvalidInputError(
                f"max_memory names {name!r} twice (the second time as {key!r}); keep one"
            )
        amounts[name] = parse_bytes(value)
    cpu_bytes, disk_bytes = amounts.get(CPU), amounts.get(DISK)
    devices = {name: n for name, n in amounts.items() if name not in (CPU, DISK)}
    if not devices and cpu_bytes is not None:
        devices = {CPU: cpu_bytes}
    return MemoryBudget(devices, cpu_bytes, disk_bytes)


def _device_name(key: object, accelerators: Sequence[str]) -> str:
    text = str(key)
    if text in (CPU, DISK) or text in accelerators:
        return text
    if f"{text}:0" in accelerators:
        return f"{text}:0"
    if text.isdecimal() and int(text) < len(accelerators):
        return accelerators[int(text)]
    known = [*range(len(accelerators)), *accelerators, CPU, DISK]
    raise InvalidInputError(
        f"max_memory has the key {key!r}, which is no device of this machine; "
        f"it has {', '.join(repr(name) for name in known)}"
    )
