"""What the caches show of themselves: live views, and attributes of the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from diskoffload.cache import modes
from diskoffload.residency.held import Held, held_of
from diskoffload.residency.resident import Residency


class OnClass:
    """A read-only attribute that is computed on the class as well as on instances."""

    def __init__(self, compute: Any) -> None:
        self._compute = compute

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self._compute()


class OffloadedValues(Mapping[Any, "torch.Tensor | None"]):
    """Offloaded tensors by name."""

    def __init__(self, held: dict[Any, Held | None]) -> None:
        self._held = held

    def __getitem__(self, key: Any) -> torch.Tensor | None:
        held = self._held[key]
        return None if held is None else held.offloaded

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class KeptValues(Mapping[torch.Tensor, torch.Tensor]):
    """What this thread keeps now: offloaded tensor -> onloaded tensor. A live view."""

    def _kept(self) -> dict[Held, Residency]:
        return modes.current().kept or {}

    def __getitem__(self, offloaded: torch.Tensor) -> torch.Tensor:
        held = held_of(offloaded)
        if held is None or held not in self._kept() or held.tensor is None:
            raise KeyError(offloaded)
        return held.tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([held.offloaded for held in self._kept()])

    def __len__(self) -> int:
        return len(self._kept())

    def __contains__(self, offloaded: Any) -> bool:
        return isinstance(offloaded, torch.Tensor) and held_of(offloaded) in self._kept()
