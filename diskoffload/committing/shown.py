"""What a model shows, name by name, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diskoffload.cache.base import OffloadCache
from diskoffload.residency.held import Held, State
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.commits import Entry

Value = Held | torch.Tensor


@dataclass(frozen=True)
class Shown:
    """One name of the model, and what it shows."""

    name: str
    is_parameter: bool
    persistent: bool
    value: Value | None

    @property
    def root(self) -> Value | None:
        """The value, or, of a view, the entry of all the bytes."""
        value = self.value
        return value.root if isinstance(value, Held) and is_view(value) else value

    def described(self, entry: Entry) -> Entry:
        """Add to a place what kind of tensor is there."""
        if not self.is_parameter:
            return {**entry, "is": "buffer" if self.persistent else "unsaved buffer"}
        grad = self.value is not None and self.value.requires_grad
        return {**entry, "is": "parameter", "grad": grad}

    def is_frozen(self, dtype: torch.dtype) -> bool:
        """Whether it could be trained and is not."""
        can_train = self.is_parameter and (dtype.is_floating_point or dtype.is_complex)
        return can_train and self.value is not None and not self.value.requires_grad


class Faces:
    """The mappings of a model's modules, as they are now; found by one walk over the model.

    Attributes:
        caches: those that offload.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._mappings: list[tuple[str, torch.nn.Module, Mapping[str, Any]]] = [
            (f"{prefix}." if prefix else "", module, mapping)
            for prefix, module in model.named_modules()
            for mapping in (module._parameters, module._buffers)
        ]
        mappings: list[Any] = [mapping for _, _, mapping in self._mappings]
        self.caches = [one for one in mappings if isinstance(one, OffloadCache)]

    def shown(self) -> Iterator[Shown]:
        """Give every name and what it shows; the locks of the caches' books are held."""
        for prefix, module, mapping in self._mappings:
            entries: Any = mapping
            pairs = entries.held_items() if isinstance(entries, OffloadCache) else entries.items()
            is_parameter = mapping is module._parameters
            unsaved = module._non_persistent_buffers_set
            for key, value in list(pairs):
                yield Shown(f"{prefix}{key}", is_parameter, key not in unsaved, value)

    def born(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Give dtype and shape of every tensor as it was when its module was offloaded."""
        return {
            f"{prefix}{key}": layout
            for prefix, _, mapping in self._mappings
            if isinstance(mapping, OffloadCache)
            for key, layout in mapping.born.items()
        }


def is_view(value: Value) -> bool:
    """Whether an entry is a view of another's bytes, and has not been given others since."""
    return (
        isinstance(value, Held)
        and isinstance(value.backing, ViewBacking)
        and value.state is not State.FRESH
        and not value.is_changed()
    )


def identity(value: Value) -> int:
    """Give what is the same for two names of one tensor."""
    # A tie between a plain and an offloaded module is one object behind two faces.
    tensor = value.tensor if isinstance(value, Held) else value
    return id(value if tensor is None else tensor)


def has_value(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its elements, so that they can be written."""
    return not tensor.is_meta and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
