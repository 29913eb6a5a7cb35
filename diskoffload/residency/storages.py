"""Entries whose tensors lie on one storage: disjoint parts of it, or views of the same bytes.

Parts that do not overlap (``q, k, v = fused.chunk(3)``) are entries of their own, and only
have to be counted when it is judged whether a storage is in use. Overlapping ones are a tie:
an edit of one is an edit of the other. Such entries become views of a *root*, an entry that
no module shows, which alone is stored, loaded and moved; its views lie wherever it lies.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from diskoffload.residency.held import Backing, Held, State
from diskoffload.residency.objects import span_of
from diskoffload.store.pieces import Streamable
from diskoffload.store.stored import ShardTensor
from diskoffload.store.writer import Ticket, digest_of


class Onloads(Protocol):
    """What brings entries into memory."""

    def onload(self, held: Held, device: torch.device) -> torch.Tensor:
        """Bring an entry's value beneath its object on a device."""


class ViewBacking:
    """A value that is a view of another entry's; never changes."""

    is_counted = False  # the root is asked

    def __init__(
        self, residency: Onloads, root: Held, view: torch.Tensor, offset_bytes: int
    ) -> None:
        """Describe a view.

        Args:
            residency: brings the root into memory.
            root: the entry of all the bytes.
            view: a tensor with the dtype, shape and strides.
            offset_bytes: where the view begins in the root.
        """
        self.root: Held = root
        self.layout = (view.dtype, tuple(view.shape))
        self._residency = residency
        self._strides = view.stride()
        self._offset_bytes = offset_bytes

    @property
    def memory(self) -> torch.Tensor | None:
        """The view of the memory that the root waits in, if that is memory."""
        assert self.root.backing is not None  # what is as it is was never tied
        whole = self.root.backing.memory
        return None if whole is None else self.view_of(whole)

    @classmethod
    def from_description(
        cls, residency: Onloads, root: Held, described: Mapping[str, Any], dtype: torch.dtype
    ) -> ViewBacking:
        """Make the view again that :meth:`described` told of."""
        shape, strides = described["shape"], described["strides"]
        view = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return cls(residency, root, view, described["offset_bytes"])

    def described(self) -> dict[str, Any]:
        """Tell which part of the root this is, in words that JSON has."""
        dtype, shape = self.layout
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "strides": list(self._strides),
            "offset_bytes": self._offset_bytes,
        }

    @property
    def plain_stored(self) -> ShardTensor | None:
        """Answer ``None``: the root's bytes are read."""
        return None

    @property
    def streamable(self) -> Streamable | None:
        """Answer ``None``: the root is streamed."""
        return None

    @property
    def extent(self) -> tuple[Any, ...]:
        """What tells this view of its root from others: equal ones are the same tensor."""
        return (*self.layout, self._strides, self._offset_bytes)

    def beneath(self, device: torch.device) -> torch.Tensor | None:
        """Give the view of wherever the root is brought to."""
        return self.view_of(self._residency.onload(self.root, device))

    def view_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Give the view of the root's memory, wherever that is."""
        whole = whole.detach()
        dtype, shape = self.layout
        start = whole.storage_offset() * whole.dtype.itemsize + self._offset_bytes
        made = torch.empty(0, dtype=dtype, device=whole.device)
        return made.set_(whole.untyped_storage(), start // dtype.itemsize, shape, self._strides)

    def load(self, device: torch.device) -> torch.Tensor:
        """Copy the view out of the root."""
        return self.view_of(self._residency.onload(self.root, device)).clone()

    def check_open(self, name: str) -> None:
        """Ask the root."""
        assert self.root.backing is not None
        self.root.backing.check_open(name)

    def rewrite(self, name: str, value: torch.Tensor) -> Backing | Ticket:
        """Take a value that lies elsewhere now: it is no view of the root any more."""
        return self.apart((value.dtype, tuple(value.shape))).rewrite(name, value)

    def succeed(self, ticket: Ticket) -> Backing:
        """Stand alone from now on."""
        assert self.root.backing is not None
        return self.root.backing.succeed(ticket)

    def apart(self, layout: tuple[torch.dtype, tuple[int, ...]]) -> Backing:
        """Have newer values go where the root's go."""
        assert self.root.backing is not None
        return self.root.backing.apart(layout)

    def over(self, root: Held) -> ViewBacking:
        """Describe the same view of another root."""
        made = ViewBacking.__new__(ViewBacking)
        made.__dict__.update(self.__dict__)
        made.root = root
        return made

    def through(self, outer: ViewBacking) -> ViewBacking:
        """Describe the same view of the root of which its own root became a view."""
        made = self.over(outer.root)
        made._offset_bytes += outer._offset_bytes
        return made

    def twin(self, memo: dict[int, Any], *, gaps: bool) -> Backing | None:
        """Answer ``None``: a copy is a view of the root's copy, see :meth:`over`."""
        return None

    def holds(self, value: torch.Tensor) -> bool:
        """Compare a value with that part of the root."""
        return digest_of(self.load(value.device)) == digest_of(value)

    def was_edited(self, value: torch.Tensor) -> bool:
        """Answer no: an edit here is one of the root, and found there."""
        return False

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Do nothing: the root does."""


class _Mates(list["weakref.ref[Held]"]):
    """The entries that were seen on one storage; theirs, so it lasts as long as any of them."""


class Storages:
    """Which entries lie on which storage. Guarded by the residency's lock."""

    def __init__(self) -> None:
        # Most storages have one entry only, which needs no list.
        self._alone: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
        self._mates: weakref.WeakValueDictionary[int, _Mates] = weakref.WeakValueDictionary()

    def note(self, held: Held) -> Held | None:
        """Remember what an entry lies on; give one whose bytes overlap with its, if there is.

        Entries on one storage know of each other afterwards.
        """
        key = held.storage_key()
        if not key:
            return None
        mates = self._mates.get(key)
        if mates is None:
            first = self._alone.get(key)
            if first is None or first is held or first.storage_key() != key:
                self._alone[key] = held
                return None
            mates = self._mates[key] = _Mates([weakref.ref(first)])
        others = [one for ref in mates if (one := ref()) is not None and one is not held]
        here = [one for one in others if one.storage_key() == key]
        mates[:] = [weakref.ref(one) for one in (*here, held)]
        for one in (*here, held):
            one.mates = mates
        overlapping = [one for one in here if one.overlaps(held)]
        for one in overlapping:
            if one.root is not one and one.root.storage_key() != key:
                one.stand_alone()  # it was given this memory as its value, and was not looked at
        # Of a tie the root stands for all: its views come and go.
        roots = [one.root for one in overlapping]
        return next((root for root in roots if root.backing is not None), None)


def root_of(mate: Held, residency: Onloads) -> Held:
    """Give the entry of all the bytes that a tensor lies on; make it if there is none yet.

    A root that is made takes over the mate's value where that is all of the storage; else it
    is FRESH and still to be written.

    Args:
        mate: an entry, or already a root.
        residency: brings the root into memory.
    """
    tensor, backing = mate.tensor, mate.backing
    assert tensor is not None  # it lies in memory
    assert backing is not None  # what is as it is was never noted
    if mate.views is not None:
        return mate
    start, stop = span_of(tensor)
    if tensor.is_contiguous() and stop - start == tensor.untyped_storage().nbytes():
        root = Held(mate.name, backing, tensor=tensor.detach())
        mate.hand_over(root)
    else:
        root = Held(mate.name, backing, tensor=_whole_storage(tensor), state=State.FRESH)
    root.views = weakref.WeakSet()
    become_view(mate, root, residency)
    return root


def _whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """View all of the storage that a tensor lies on, in its dtype if that divides it."""
    storage = tensor.untyped_storage()
    dtype = torch.uint8 if storage.nbytes() % tensor.dtype.itemsize else tensor.dtype
    made = torch.empty(0, dtype=dtype, device=tensor.device)
    return made.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def is_another_view(held: Held) -> bool:
    """Whether an entry was given another view of the same root as its value."""
    root = held.root
    if root is held or held.state is not State.BENEATH or not held.is_changed():
        return False
    return held.storage_key() == root.storage_key()


def become_view(held: Held, root: Held, residency: Onloads) -> None:
    """Turn an entry that lies on a root's bytes into a view of it; so are its own views then."""
    views, held.views = held.views, None
    root_views = root.views
    assert root_views is not None
    assert held.tensor is not None
    assert root.tensor is not None
    assert held.tensor.untyped_storage()._cdata == root.tensor.untyped_storage()._cdata
    offset_bytes = held.tensor.data_ptr() - root.tensor.data_ptr()
    held.drop_ticket()
    held.backing = ViewBacking(residency, root, held.tensor, offset_bytes)
    held.lay(held.tensor, State.BENEATH)
    for view in list(views or ()):
        if view.root is not held:
            continue
        if view.state is not State.VACANT and view.storage_key() != root.storage_key():
            view.stand_alone()
        else:
            assert isinstance(view.backing, ViewBacking)  # it has a root
            view.backing = view.backing.through(held.backing)
            root_views.add(view)
