"""The mapping that a module reads its parameters and buffers from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, ItemsView, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from types import MemberDescriptorType
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diskoffload.cache import modes, tracing
from diskoffload.cache.views import KeptValues, OffloadedValues, OnClass
from diskoffload.errors import (
    InvalidInputError,
    NotOffloadedError,
    UnsupportedError,
    UnsupportedTensorError,
)
from diskoffload.residency.held import (
    Backing,
    Held,
    Showing,
    State,
    held_of,
)
from diskoffload.residency.objects import is_ours_to_move
from diskoffload.residency.resident import Residency, default_residency
from diskoffload.residency.twins import twin_once
from diskoffload.system.devices import usable_device

Device = torch.device | str | int
_Cache = TypeVar("_Cache", bound="OffloadCache")


class OffloadCache(MutableMapping[Any, "torch.Tensor | None"], ABC):
    """A dictionary that offloads what is assigned to it and onloads what is read from it.

    Every entry has one Parameter or Buffer object for life; only the memory beneath it
    comes and goes. Assigning an object makes it the entry's object, as in a dictionary:
    a later edit of it is an edit of the entry. Putting the object back that is there
    already writes nothing.

    Thread-safe. A read that finds its tensor in place takes no lock.

    Attributes:
        onload_device: where reads bring tensors; may be set at any time.
        offload_device: where tensors wait, a device or ``"disk"``.
        name: full name of the module in the model, for the names in files; may be empty.
        born: dtype and shape of what was there when the module was offloaded.
        traced: what compiled code reads, and thereby keeps in memory; see ``cache.tracing``.
    """

    # A model has thousands, of which half stay empty: slots take half of the time and memory.
    __slots__ = (
        "__weakref__",
        "_held",
        "_published",
        "born",
        "name",
        "onload_device",
        "residency",
        "traced",
    )

    offload_device: torch.device | str
    onload_device: torch.device
    residency: Residency
    name: str
    born: dict[Any, tuple[torch.dtype, tuple[int, ...]]]
    traced: dict[Any, torch.Tensor | None]
    _options: ClassVar[tuple[tuple[Callable[..., Any], Callable[..., None]], ...]]
    _held: dict[Any, Held | None]
    _published: dict[Any, torch.Tensor | None]

    offloading_disabled: bool = OnClass(lambda: modes.current().kept is not None)  # type: ignore[assignment]
    """Whether this thread is inside ``disable_offloading``."""
    onloading_disabled: bool = OnClass(lambda: modes.current().onloading_disabled)  # type: ignore[assignment]
    """Whether this thread is inside ``disable_onloading``."""
    keep_onloaded_values: Mapping[torch.Tensor, torch.Tensor] = KeptValues()
    """What this thread keeps: offloaded tensor -> onloaded tensor, a live view."""

    # ------------------------------------------------------------------ making one

    @staticmethod
    def cls_from_device(device: Device | None = None) -> type[OffloadCache]:
        """Find the class that offloads to a device, or to ``"disk"``.

        Raises:
            InvalidInputError: nothing can be offloaded there.
        """
        try:
            kind = "disk" if device == "disk" else torch.device(device or "cpu").type
        except RuntimeError as error:
            raise InvalidInputError(f"{device!r} is no device to offload to: {error}") from error
        found = _classes.get(kind, None if kind == "meta" else _classes.get("*"))
        if found is None:
            known = ", ".join(sorted(set(_classes) - {"*"}))
            raise InvalidInputError(f"cannot offload to {device!r}; use {known} or an accelerator")
        return found

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._options = tuple(
            (found.__get__, found.__set__)
            for base in cls.__mro__
            for name, found in vars(base).items()
            if isinstance(found, MemberDescriptorType) and name not in _OWN
        )
        tracing.keep_dynamo_out(cls)
        if kind is not None:
            _classes[kind] = cls

    @classmethod
    def from_mapping(
        cls: type[_Cache],
        mapping: Mapping[Any, torch.Tensor | None],
        onload_device: Device,
        offload_device: Device | None = None,
        **kwargs: Any,
    ) -> _Cache:
        """Make a cache of a module's ``_parameters`` or ``_buffers``; its tensors are offloaded.

        Given another cache, its entries are taken over, objects and all; what lies on
        disk already stays where it lies.

        Args:
            mapping: the dictionary, or a cache.
            onload_device: where reads bring tensors.
            offload_device: where they wait; must suit the class.
            **kwargs: for the class's constructor.
        """
        made = cls(onload_device, offload_device, **kwargs)
        made.take(mapping)
        return made

    def take(self, mapping: Mapping[Any, torch.Tensor | None]) -> None:
        """Offload what a dictionary has, or take over another cache's entries; we are empty yet."""
        if isinstance(mapping, OffloadCache):
            self.born.update(mapping.born)
            for key, held in mapping._held.items():
                if held is not None and mapping.residency is not self.residency:
                    mapping.residency.hand_over(held.root, self.residency)
                self._take_over(key, held)
            return
        for key, value in mapping.items():
            self[key] = value
            if value is not None:
                self.born[key] = value.dtype, tuple(value.shape)

    def __init__(
        self,
        onload_device: Device,
        offload_device: Device | None = None,
        *,
        name: str = "",
        residency: Residency | None = None,
    ) -> None:
        """Start empty.

        Args:
            onload_device: where reads bring tensors.
            offload_device: if given, must be the class's own.
            name: full name of the module in the model.
            residency: keeps the books of what is in memory; one per process by default.

        Raises:
            InvalidInputError: no such device, not on this machine, or not this class's.
        """
        self.name = name
        for put in _put_tables:
            put(self, {})
        self.residency = residency or default_residency
        object.__setattr__(self, "onload_device", usable_device(onload_device))
        if offload_device is not None:
            self._check_offload_device(offload_device)

    def like(self: _Cache, name: str) -> _Cache:
        """Give an empty cache for the module of that name, which offloads as this one does.

        It costs a fifth of what the constructor does, and a model has thousands.
        """
        made: _Cache = object.__new__(type(self))
        # By the slots themselves: our own __setattr__ would take most of the time.
        _put_name(made, name)
        for put in _put_tables:
            put(made, {})
        for option, put_option in self._options:
            put_option(made, option(self))
        if type(self).__dictoffset__:  # a class that somebody derived
            made.__dict__.update(self.__dict__)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        # Not a property: dynamo would take hold of every tensor before its memory is settled.
        if name != "onload_device":
            object.__setattr__(self, name, value)
            return
        device = usable_device(value)
        with self.residency.lock:
            object.__setattr__(self, name, device)
            for key, held in self._held.items():
                if held is not None:
                    held.unbind(self._published, key)
                    held.bind(Showing(self._published, key, device))

    def _check_offload_device(self, offload_device: Device) -> None:
        if str(offload_device) != str(self.offload_device):
            raise InvalidInputError(
                f"{type(self).__name__} offloads to {self.offload_device}, not to "
                f"{offload_device}; use OffloadCache.cls_from_device to find the class"
            )

    # ------------------------------------------------------------------ what a kind adds

    @abstractmethod
    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """Give the tensor on the onload device for an offloaded one."""

    @abstractmethod
    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Give the offloaded tensor for a tensor."""

    @abstractmethod
    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """Give an offloaded tensor a new value, taken at the call."""

    @abstractmethod
    def _back(self, tensor: torch.Tensor) -> tuple[Backing, State, bool]:
        """Say what backs a new tensor, what state that is, and whether to write it out."""

    @abstractmethod
    def _accepts(self, held: Held) -> bool:
        """Tell whether an entry's backing is already of this cache's kind."""

    def _rebase(self, held: Held) -> None:
        """Have later changes of an entry whose value stays where it is go where ours go."""

    @abstractmethod
    def _move_in(self, held: Held) -> None:
        """Move the value of an onloaded entry to where this cache keeps it."""

    @abstractmethod
    def _free(self, held: Held, onload: bool) -> torch.Tensor:
        """Give an entry's object with its value, independent of this cache."""

    # ------------------------------------------------------------------ the mapping

    @tracing.traced_as(tracing.read_traced)
    def __getitem__(self, key: Any) -> torch.Tensor | None:
        if not modes.entered:
            try:
                return self._published[key]
            except KeyError:
                pass
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __setitem__(self, key: Any, value: torch.Tensor | None) -> None:
        if value is not None and not isinstance(value, torch.Tensor):
            raise InvalidInputError(
                f"cannot assign {type(value).__name__} to {self._full_name(key)!r}: "
                "a module's entry is a tensor or None"
            )
        held = None if value is None else held_of(value)
        if held is None and value is not None:
            self.residency.postpone(self._held.get(key))
            held = self._new(key, value)
        with self.residency.lock:
            old = self._held.get(key)
            if held is not None and held is old:
                return
            tracing.replace(self, key, held)
            self._drop(key, old)
            if held is None:
                self._show_none(key)
            else:
                self._show(key, held)

    def __delitem__(self, key: Any) -> None:
        with self.residency.lock:
            self._drop(key, self._held[key])
            del self._held[key]
            self.traced.pop(key, None)

    def discard(self, key: Hashable) -> None:
        """Remove an entry if it is there; ``Module.__setattr__`` treats us as a set."""
        if key in self._held:
            del self[key]

    def copy(self) -> dict[Any, torch.Tensor | None]:
        """Refuse: only the replication of a module over devices asks for it.

        A replica's ``forward`` would be the original's, and every weight would be loaded at
        once on every device. ``dict(cache)`` gives a plain dictionary.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "an offloaded module cannot be replicated over devices (torch.nn.DataParallel): "
            "spread it over them with diskoffload.dispatch_model, or run a process per device; "
            "for a plain dictionary of its tensors use dict(...)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dictionary with its values; what is read is loaded, and held."""
        return dict, (dict(self.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadCache:
        """Copy the cache; what is unchanged on disk is read from there, not copied."""
        made = self.like(self.name)
        made.born.update(self.born)
        memo[id(self)] = made
        with self.residency.lock:
            for key, held in self._held.items():
                if held is None:
                    made[key] = None
                    continue
                made._show(key, twin_once(held, partial(made._new, key), memo))
        return made

    def __del__(self) -> None:
        # A tie's entry outlives this cache, and would keep the tensors beside it.
        published = getattr(self, "_published", None)
        if published is None:
            return  # it was never finished
        for held in self._held.values():
            if held is not None:
                held.unbind_all(published)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({list(self._held)}, onload_device={self.onload_device}, "
            f"offload_device={self.offload_device})"
        )

    @property
    def offloaded_values(self) -> Mapping[Any, torch.Tensor | None]:
        """The offloaded tensors by name, a live view; on disk they are meta tensors."""
        return OffloadedValues(self._held)

    # ------------------------------------------------------------------ modes

    @classmethod
    def disable_offloading(cls) -> AbstractContextManager[None]:
        """See :func:`diskoffload.disable_offloading`."""
        return modes.disable_offloading()

    @classmethod
    def disable_onloading(cls) -> AbstractContextManager[None]:
        """See :func:`diskoffload.disable_onloading`."""
        return modes.disable_onloading()

    # ------------------------------------------------------------------ entries

    @tracing.traced_as(tracing.update_traced)
    def set_value(self, key: Any, data: torch.Tensor) -> None:
        """Give an entry the value that ``data`` has now; its object stays.

        Raises:
            KeyError: no such entry, or ``None`` is in it.
            RuntimeError: ``data`` cannot be broadcast to its shape.
        """
        with self.residency.lock:
            held = self._held[key]
            if held is None:
                raise KeyError(key)
            self.residency.update(held, data, self.onload_device)

    def release_entries(self, *, onload: bool) -> dict[Any, torch.Tensor | None]:
        """Give up every entry, and give the plain dictionary of their objects.

        Args:
            onload: bring them to the onload device, in memory that is theirs. Otherwise
                they stay where they are offloaded; those on disk alias the file.
        """
        plain: dict[Any, torch.Tensor | None] = {}
        with self.residency.lock:
            for key, held in self._held.items():
                plain[key] = None if held is None else self._free(held, onload)
            self.detach()
        return plain

    def detach(self) -> None:
        """Forget every entry without touching its object."""
        for held in self._held.values():
            if held is not None:
                held.unbind_all(self._published)
        self._held.clear()
        self._published.clear()
        self.traced.clear()

    def held_items(self) -> ItemsView[Any, Held | None]:
        """Give the entries themselves; for those who move or save them without reading."""
        return self._held.items()

    def bind_lazily(self, key: Any, held: Held) -> None:
        """Show an entry whose object is made at its first read."""
        tracing.replace(self, key, held)
        self._drop(key, self._held.get(key))
        self._show(key, held)

    def bind_all_lazily(self, entries: Mapping[Any, Held | None]) -> None:
        """Show entries whose objects are made at their first read, in a cache that has none yet."""
        if not entries:
            return
        tracing.caches_shown.add(self)
        for key, held in entries.items():
            self._held[key] = held
            if held is None:
                self._published[key] = None
                continue
            assert held.backing is not None  # or it would have no value
            self.born[key] = held.backing.layout
            held.bind(Showing(self._published, key, self.onload_device))
            self.residency.expect(held)

    def _read(self, key: Any) -> torch.Tensor | None:
        with self.residency.lock:  # else another thread may replace the entry meanwhile
            held = self._held[key]
            if held is None:
                return None
            if modes.entered:
                if modes.current().onloading_disabled:
                    return tracing.unless_exporting(held.offloaded)
                modes.keep(held, self.residency)
            return self.residency.onload(held, self.onload_device)

    def _full_name(self, key: Any) -> str:
        return f"{self.name}.{key}" if self.name else str(key)

    def _new(self, key: Any, value: torch.Tensor) -> Held:
        name = self._full_name(key)
        if type(value) is not torch.nn.Parameter and is_traceable_wrapper_subclass(value):
            raise UnsupportedTensorError(
                f"cannot offload {name!r}: a {type(value).__name__} is a wrapper of several "
                "tensors; leave its module plain, or offload the model before it is quantized"
            )
        if not is_ours_to_move(value):
            return Held(name, None, tensor=value, state=State.AS_IS)
        backing, state, write = self._back(value)
        held = Held(name, backing, tensor=value, state=state)
        held.lay(value, state)
        self.residency.adopt(held, write=write)
        return held

    def _take_over(self, key: Any, held: Held | None) -> None:
        """Bind an entry of another cache, and move its value to where this cache keeps it."""
        if held is None:
            self._show_none(key)
            return
        root = held.root
        if root.backing is not None and not self._accepts(root):
            with self.residency.lock:
                self.residency.onload(held, self.onload_device)
                self._move_in(root)
        elif root.backing is not None:
            self._rebase(root)
        self._show(key, held)

    def _show_none(self, key: Any) -> None:
        if not self._held:
            tracing.caches_shown.add(self)
        self._held[key] = self._published[key] = None

    def _show(self, key: Any, held: Held) -> None:
        with self.residency.lock:
            if not self._held:
                tracing.caches_shown.add(self)  # not before: half of a model's caches stay empty
            self._held[key] = held
            held.bind(Showing(self._published, key, self.onload_device))
            self.residency.expect(held)
            self.residency.unpark(held)

    def _drop(self, key: Any, held: Held | None) -> None:
        self._published.pop(key, None)
        if held is not None:
            with self.residency.lock:
                held.unbind(self._published, key)
                self.residency.park(held)

    def _entry(self, offloaded: torch.Tensor) -> Held:
        held = held_of(offloaded)
        if held is None:
            raise NotOffloadedError(
                f"this tensor of shape {tuple(offloaded.shape)} is not an offloaded one; "
                "take it from `offloaded_values` or from `offload`"
            )
        return held


def is_cache(mapping: object) -> TypeGuard[OffloadCache]:
    """Whether a module's dictionary is offloaded.

    To ask an abstract class takes longer than all else that is done for most modules.
    """
    return OffloadCache in type(mapping).__mro__


# What a cache has of its own; the other slots are how it offloads.
_TABLES = ("_held", "_published", "born", "traced")
_OWN = frozenset((*_TABLES, "name", "__weakref__"))
_slots: Any = OffloadCache
_put_name = _slots.name.__set__
_put_tables = [getattr(_slots, name).__set__ for name in _TABLES]

tracing.keep_dynamo_out(OffloadCache, but=("__getitem__", "__contains__", "__iter__", "__len__"))

_classes: dict[str, type[OffloadCache]] = {}
