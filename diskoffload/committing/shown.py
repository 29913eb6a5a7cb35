"""What a model shows, name by name, without reading a tensor."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from diskoffload.cache.base import OffloadCache, is_cache
from diskoffload.cache.disk import DiskCache
from diskoffload.errors import InvalidInputError, NotOffloadedError
from diskoffload.residency.held import Held, State
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.commits import Entry
from diskoffload.store.folder import Folder

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


class Face(NamedTuple):
    """One mapping of a module: its parameters or its buffers.

    Attributes:
        prefix: of the names it shows.
        module: the module.
        is_parameter: whether they are parameters.
        cache: the mapping, if it is offloaded.
        plain: the mapping, if it is not.
    """

    prefix: str
    module: torch.nn.Module
    is_parameter: bool
    cache: OffloadCache | None
    plain: Mapping[str, torch.Tensor | None]

    def held(self) -> list[Held]:
        """List its entries; none of a plain one."""
        if self.cache is None:
            return []
        return [held for _, held in self.cache.held_items() if held is not None]

    def layout(self) -> tuple[object, ...]:
        """Give what its entries do not know: names, which are ``None``, which are not saved."""
        names = [(key, value is None) for key, value in self._items()]
        unsaved = () if self.is_parameter else frozenset(self.module._non_persistent_buffers_set)
        return self.prefix, self.is_parameter, names, unsaved

    def shown(self) -> Iterator[Shown]:
        """Give every name and what it shows."""
        is_parameter, unsaved = self.is_parameter, self.module._non_persistent_buffers_set
        for key, value in list(self._items()):
            yield Shown(f"{self.prefix}{key}", is_parameter, key not in unsaved, value)

    def born(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Give dtype and shape of every tensor as it was when its module was offloaded."""
        born = {} if self.cache is None else self.cache.born
        return {f"{self.prefix}{key}": layout for key, layout in born.items()}

    def _items(self) -> ItemsView[str, Value | None]:
        return self.plain.items() if self.cache is None else self.cache.held_items()


def faces_of(model: torch.nn.Module) -> list[Face]:
    """Find the mappings of a model's modules, as they are now, by one walk over it.

    Most are empty and always were: those are left out.
    """
    faces = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for mapping, is_parameter in ((module._parameters, True), (module._buffers, False)):
            found: Any = mapping
            if is_cache(found):
                if found.held_items() or found.born:
                    faces.append(Face(prefix, module, is_parameter, found, {}))
            elif found:
                faces.append(Face(prefix, module, is_parameter, None, found))
    return faces


def folder_of(model: torch.nn.Module, faces: list[Face]) -> Folder:
    """Find the one folder that a model is offloaded to.

    Raises:
        NotOffloadedError: nothing of it is offloaded to disk.
        InvalidInputError: its modules are offloaded to several.
    """
    folders = {
        id(one.cache.folder): one.cache.folder for one in faces if isinstance(one.cache, DiskCache)
    }
    if not folders:
        raise nothing_offloaded(model)
    if len(folders) > 1:
        places = sorted(str(folder.path) for folder in folders.values())
        raise InvalidInputError(
            f"the model is offloaded to {len(folders)} folders ({', '.join(places)}), and a commit "
            "is one folder's; offload all of it to one offload_dir"
        )
    return next(iter(folders.values()))


def nothing_offloaded(model: torch.nn.Module) -> NotOffloadedError:
    """Say that a model has no folder."""
    return NotOffloadedError(
        f"nothing of this {type(model).__name__} is offloaded to disk, so there is no folder "
        "to commit to; open it with open_checkpoint or offload it with offload_dir"
    )


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
