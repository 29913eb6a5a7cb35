"""One entry of a module: its object for life, and what lies under that object now.

An entry's Parameter or Buffer object never changes by itself. Only the memory beneath it
comes and goes::

    VACANT    nothing lies beneath; the value is in the backing
    BENEATH   the backing's own memory does: a mapped file, or RAM on the same device
    LOADED    a copy made from the backing: decoded, converted, or on another device
    FRESH     a value that is newer than the backing, perhaps on its way to it
    AS_IS     a value that is none of our business (a graph's output, a fake tensor)

Memory is taken away from beneath an object only while nothing else can be using it,
which is judged by use counts: of the Python object, of the tensor (autograd) and of its
storage (views, ``.data``, numpy).
"""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from diskoffload.residency.laid import Laid
from diskoffload.residency.objects import object_like, out_of_inference_mode, span_of, uses_of
from diskoffload.store.fills import Check
from diskoffload.store.pieces import Streamable
from diskoffload.store.stored import ShardTensor
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.memory import Memory
from diskoffload.system.write_watch import Mark


class State(enum.Enum):
    """What lies beneath an entry's object."""

    VACANT = enum.auto()
    BENEATH = enum.auto()
    LOADED = enum.auto()
    FRESH = enum.auto()
    AS_IS = enum.auto()


class Backing(Protocol):
    """Where an entry's value is when it is offloaded. Never changes; thread-safe."""

    @property
    def memory(self) -> torch.Tensor | None:
        """The memory in which the value waits, or ``None`` where it is on disk."""

    @property
    def is_counted(self) -> bool:
        """Whether all who use the memory count as users of its storage; asked if there is any."""

    @property
    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Element type and shape of the value."""

    @property
    def root(self) -> Held | None:
        """The entry that the value is a view of, if it is one."""

    @property
    def plain_stored(self) -> ShardTensor | None:
        """The tensor in a file whose bytes are the value's, if there is one."""

    @property
    def streamable(self) -> Streamable | None:
        """The tensor in a file that can be read past the page cache, if there is one."""

    def view_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Give that view of the root's memory."""

    def beneath(self, device: torch.device) -> torch.Tensor | None:
        """Give memory of the backing's own that may lie beneath an object on the device."""

    def load(self, device: torch.device) -> torch.Tensor:
        """Give the value in fresh memory on the device."""

    def check_open(self, name: str) -> None:
        """Raise what :meth:`rewrite` would if the place for newer values is closed."""

    def rewrite(self, name: str, value: torch.Tensor) -> Backing | Ticket:
        """Take a newer value: at once (a new backing), or soon (a ticket)."""

    def succeed(self, ticket: Ticket) -> Backing:
        """Give the backing that holds what a ticket has stored."""

    def apart(self, layout: tuple[torch.dtype, tuple[int, ...]]) -> Backing:
        """Give a backing for another value, of which it has nothing yet; newer ones go as here."""

    def twin(self, memo: dict[int, Any], *, gaps: bool) -> Backing | None:
        """Give a backing of the same value that shares no memory with this one.

        ``None`` where only a copy of the value will do. ``memo`` is :mod:`copy`'s; ``gaps``
        between elements stay or are closed.
        """

    def holds(self, value: torch.Tensor) -> bool:
        """Tell whether a value of the same dtype and shape is the one here, byte for byte."""

    def was_edited(self, value: torch.Tensor) -> bool:
        """Tell whether memory given by :meth:`beneath` was changed in place."""

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Give back what edits at this place have cost; nobody uses it any more."""


class Showing(NamedTuple):
    """One place that shows an entry's object: a key of a cache that onloads to a device."""

    published: dict[Any, torch.Tensor | None]
    key: Any
    device: torch.device


class Held:
    """One entry. Guarded by its residency's lock, but for :attr:`tensor`, which is for life.

    Attributes:
        name: its full name in the model, as far as it is known.
        tensor: the object for life; ``None`` until the first read of a lazy entry, and once
            an object that was lent is gone.
        backing: where the value is when it is offloaded.
        state: what lies beneath the object.
        ticket: the write under way, if any.
        bindings: every place that shows the object; ties have several.
        place: the device it was brought to last, as that was spelled.
        keepers: how many ``disable_offloading`` contexts want it to stay.
        mates: every entry that was seen on the same storage, this one included.
        views: of a root, the entries that are views of it; they lie wherever it lies.
        buffer: memory to be used again when the object no longer lies on it.
        check: the digest that is being made of the value since nobody uses it.
        rest: what somebody noted of the value when nobody used it, see :meth:`lay_to_rest`; gone
            as soon as a reader may have the object.
    """

    __slots__ = (
        "__weakref__",
        "_laid",
        "_lent",
        "_object",
        "_template",
        "backing",
        "bindings",
        "buffer",
        "check",
        "keepers",
        "mates",
        "name",
        "place",
        "rest",
        "state",
        "ticket",
        "views",
    )

    def __init__(
        self,
        name: str,
        backing: Backing | None,
        *,
        tensor: torch.Tensor | None = None,
        template: torch.Tensor | None = None,
        state: State = State.VACANT,
    ) -> None:
        self.name = name
        self.backing = backing
        self._object = tensor
        self._lent: weakref.ref[torch.Tensor] | None = None
        self.state = state
        self.ticket: Ticket | None = None
        self.bindings: list[Showing] = []
        self.keepers = 0
        self.buffer: Memory | None = None
        self.check: Check | None = None
        self.rest: object = None
        self.place: torch.device | None = None
        self.mates: list[weakref.ref[Held]] | None = None
        self.views: weakref.WeakSet[Held] | None = None
        self._template = template
        self._laid = _NOTHING
        for shown in (tensor, template):
            if shown is not None:
                _by_object[id(shown)] = self

    def __del__(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()

    def drop_ticket(self) -> None:
        """Give up the write under way, if any; nobody else would tell its folder."""
        if self.ticket is not None:
            self.ticket.cancel()
            self.ticket = None

    def __repr__(self) -> str:
        return f"Held({self.name!r}, {self.state.name})"

    @property
    def tensor(self) -> torch.Tensor | None:
        """The object for life."""
        return self._object if self._lent is None else self._lent()

    @tensor.setter
    def tensor(self, tensor: torch.Tensor) -> None:
        self._object = tensor

    @property
    def is_lent(self) -> bool:
        """Whether the object is its user's alone now: to be neither moved nor written."""
        return self._lent is not None

    def lend(self, when_gone: Callable[[], object]) -> None:
        """Leave an object that no module shows to whoever has it; the entry lasts as long."""
        assert self._object is not None
        self.wake()
        self._lent = weakref.ref(self._object, lambda _: when_gone())
        self._object = None

    def take_back(self) -> None:
        """Have the object again; its user is about to put it back."""
        if self._lent is not None:
            self._object, self._lent = self._lent(), None
            assert self._object is not None  # it is in the user's hands

    @property
    def offloaded(self) -> torch.Tensor:
        """What stands for the entry when onloading is disabled."""
        shown = self._stand_in()
        # To make this one trainable is to make an object that is to come so. Not before it is in
        # hand, because who asks for it has no lock: see lay_to_rest.
        self.rest = None
        return shown

    def _stand_in(self) -> torch.Tensor:
        self._refresh_template()
        memory = self.backing.memory if self.backing is not None else self.tensor
        lies_here = self.state not in (State.VACANT, State.LOADED)
        if self.tensor is not None and memory is not None and lies_here:
            return self.tensor
        if self._template is None or (self._template.is_meta and memory is not None):
            assert self.tensor is not None  # a lazy entry was made from its template
            shown = self._on_meta() if memory is None else memory
            self._template = object_like(self.tensor, shown)
            _by_object[id(self._template)] = self
        return self._template

    def _on_meta(self) -> torch.Tensor:
        assert self.tensor is not None  # or there would be a template already
        if self.state is not State.VACANT or self.backing is None:
            dtype, shape = self.tensor.dtype, tuple(self.tensor.shape)
            # Gaps too, which a copy would close: the stand-in's layout tells whether it is old.
            return torch.empty_strided(shape, self.tensor.stride(), dtype=dtype, device="meta")
        dtype, shape = self.backing.layout  # the object has no elements now
        return torch.empty(shape, dtype=dtype, device="meta")

    def _refresh_template(self) -> None:
        """Have the stand-in follow what was done to the object meanwhile."""
        tensor, template = self.tensor, self._template
        if tensor is None or template is None:
            return
        if self.state is not State.VACANT and (
            (template.dtype, template.shape, template.stride())
            != (tensor.dtype, tensor.shape, tensor.stride())
        ):
            if not template.is_meta:
                self._template = None
                return
            template.requires_grad_(False).data = self._on_meta()  # who has it may put it back
        template.requires_grad_(tensor.requires_grad)
        template.__dict__.update(tensor.__dict__)

    @property
    def nbytes(self) -> int:
        """Bytes that the value takes in memory."""
        if self.backing is not None and self.state in (State.VACANT, State.LOADED):
            dtype, shape = self.backing.layout
            return torch.Size(shape).numel() * dtype.itemsize
        assert self.tensor is not None
        return self.tensor.numel() * self.tensor.dtype.itemsize

    # ------------------------------------------------------------ what readers see

    def publish(self) -> torch.Tensor:
        """Let readers find the object without asking anyone."""
        assert self.tensor is not None
        self.wake()
        for binding in self.bindings:
            self._publish_at(binding)
        for view in self._laid_views():
            view.publish()
        return self.tensor

    def _publish_at(self, binding: Showing) -> None:
        self.wake()
        if self.is_at(binding.device):
            binding.published[binding.key] = self.tensor

    def is_at(self, device: torch.device) -> bool:
        """Whether the object is where a reader on this device would have it."""
        if self.tensor is None or self.state is State.AS_IS:
            return True
        there = self.tensor.device
        return there == device or (
            there.type == device.type and (device.index is None or self.place == device)
        )

    def unpublish(self) -> None:
        """Make readers come through the slow path, where the lock is."""
        for binding in self.bindings:
            binding.published.pop(binding.key, None)
        for view in self._laid_views():
            view.unpublish()

    def bind(self, binding: Showing) -> None:
        """Add a place that shows the entry."""
        self.wake()
        self.bindings.append(binding)
        if self.state is not State.VACANT and self.tensor is not None:
            self._publish_at(binding)

    def unbind(self, published: dict[Any, torch.Tensor | None], key: Any) -> None:
        """Remove a place that shows the entry."""
        self.bindings = [
            one for one in self.bindings if one.published is not published or one.key != key
        ]
        published.pop(key, None)

    def unbind_all(self, published: dict[Any, torch.Tensor | None]) -> None:
        """Remove every place in one dictionary."""
        self.bindings = [one for one in self.bindings if one.published is not published]

    # ------------------------------------------------------------ what lies beneath

    def lay(
        self,
        value: torch.Tensor,
        state: State,
        digest: bytes = b"",
        mark: Mark | None = None,
    ) -> None:
        """Put memory beneath the object; ``value``'s other users keep sharing it.

        Args:
            value: the memory.
            state: what it is.
            digest: of its bytes, where that is known.
            mark: of its bytes, where they were marked: no digest is needed then.
        """
        self.buffer = None
        self.wake()
        following = self._laid_views()
        tensor = self.tensor
        if tensor is None:
            assert self._template is not None
            tensor = self.tensor = object_like(self._template, value)
            _by_object[id(tensor)] = self
        elif value is not tensor:
            tensor.data = value.detach()
        self.state = state
        if state is State.LOADED and not digest and mark is None:
            digest = digest_of(tensor)
        has_address = state in (State.BENEATH, State.LOADED)  # others may have no memory to name
        address = tensor.data_ptr() if has_address else 0
        self._laid = Laid(address, tensor.stride(), digest, mark)
        for view in following:
            assert view.backing is not None  # it says which part of this it is
            view.lay(view.backing.view_of(tensor), State.BENEATH)
        root = self.root
        if root is not self and root.views is not None:
            root.views.add(self)

    def hand_over(self, heir: Held) -> None:
        """Give another entry, whose object lies on the same memory, all that is known of it."""
        heir.state, heir.ticket, heir.buffer = self.state, self.ticket, self.buffer
        heir._laid = self._laid
        self.ticket = self.buffer = None
        self.wake()

    def stand_alone(self) -> None:
        """Be a view of another entry no more, for the object lies elsewhere than that one's."""
        root, tensor = self.root, self.tensor
        assert tensor is not None  # else it would lie nowhere
        assert self.backing is not None
        self.drop_ticket()
        self.backing = self.backing.apart((tensor.dtype, tuple(tensor.shape)))
        self.state = State.FRESH
        if root.views is not None:
            root.views.discard(self)

    def let_go(self) -> None:
        """Leave the object as it is from now on: its value is none of our business any more."""
        self.drop_ticket()
        self.state, self.backing = State.AS_IS, None

    def vacate(self) -> None:
        """Take the memory away. To be called on an unpublished, unheld entry only."""
        assert self.tensor is not None
        for view in self._laid_views():
            view.vacate()
        # No elements rather than no memory: a stray use is then a clear error, not a crash.
        tensor = self.tensor
        with out_of_inference_mode():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.state, self.buffer = State.VACANT, None
        self.wake()

    def as_filled(self) -> memoryview | None:
        """View the bytes of a value in a buffer that nobody uses: what a digest is made of.

        ``None`` unless the object lies there alone, whole and in order. To be called on an
        unpublished, unheld entry only, which wakes as soon as a reader may get it.
        """
        tensor, buffer, backing = self._object, self.buffer, self.backing
        if self.state is not State.LOADED or tensor is None or buffer is None or backing is None:
            return None
        if self.views is not None or self.mates is not None or self.is_kept:
            return None
        if self._is_known_weakly():
            return None
        if backing.layout != (tensor.dtype, tuple(tensor.shape)) or not tensor.is_contiguous():
            return None
        if tensor.is_conj() or tensor.is_neg():  # its value is not what lies there
            return None
        begin, nbytes = tensor.data_ptr() - buffer.address, tensor.nbytes
        if not tensor.is_cpu or begin < 0 or begin + nbytes > buffer.nbytes:
            return None
        return buffer.view(begin, nbytes)

    def lay_to_rest(self, note: object) -> bool:
        """Hide an entry that stands alone and that nobody uses, and note that in :attr:`rest`.

        As long as the note is there the value is what it was, wherever it lies, and so is what
        the object is. To be called under the lock; tells whether it was done.
        """
        if (
            self.state in (State.FRESH, State.AS_IS)
            or self.backing is None
            or (self.backing.memory is not None and not self._lies_on_counted_memory())
            or self.ticket is not None
            or len(self.bindings) != 1
            or self.is_lent
            or self.root is not self
            or self.views is not None
            or self.mates is not None
            or self.is_kept
        ):
            return False
        self.unpublish()
        self.rest = note
        if self._is_known_weakly() or self.standin_is_out() or not self.is_unheld():
            self.rest = None
            if self.state is not State.VACANT:
                self.publish()
            return False
        return True

    def _lies_on_counted_memory(self) -> bool:
        """Whether the object lies on the backing's memory, and all of that one's users count."""
        if self.backing is None or self.backing.memory is None or not self.backing.is_counted:
            return False
        there = int(self.backing.memory.untyped_storage()._cdata)
        return self.state is State.BENEATH and self.storage_key() == there

    def begin_check(self, check: Check) -> None:
        """Note that a digest is being made of the value as :meth:`as_filled` gave it."""
        self.check = check

    def wake(self) -> None:
        """Note that from now on somebody may edit the value: what was found before is doubtful."""
        self.rest = None
        if self.check is not None:
            self.check.cancel()
            self.check = None

    def is_unheld(self) -> bool:
        """Whether nothing but the entry uses object and memory. Only true when unpublished."""
        if self.tensor is None:
            return True
        uses = list(uses_of(self))
        if self.root is not self:
            return tuple(uses[:2]) == _UNHELD[:2]  # whose memory it is the root judges
        uses[2] -= self._lies_on_memory() + self._neighbour_uses()
        return (
            tuple(uses) == _UNHELD
            and not self._is_shared()
            and all(view.is_unheld() for view in self._laid_views())
        )

    def _is_known_weakly(self) -> bool:
        """Whether somebody has a weak reference, who would get an object without asking."""
        shown = (self._object, self._template)
        return any(one is not None and weakref.getweakrefcount(one) > 0 for one in shown)

    def standin_is_out(self) -> bool:
        """Whether somebody has what stands for the object offloaded."""
        template = self._template
        return template is not None and sys.getrefcount(template) > 3

    def _lies_on_memory(self) -> bool:
        """Whether the backing refers to the storage that the object lies on, as well."""
        backing = self.backing
        return self.state is State.BENEATH and backing is not None and backing.memory is not None

    def _neighbour_uses(self) -> int:
        """Count the uses of the storage by other entries."""
        if self.mates is None:
            return 0
        key, count = self.storage_key(), 0
        for ref in self.mates:
            one = ref()
            if one is None or one is self or one.storage_key() != key:
                continue
            # Who shares our bytes and is not known to is a user: they are not ours to take away.
            if one.is_changed() if one.root is self else one.overlaps(self):
                continue
            count += 1 + (one.root is one and one._lies_on_memory())
        return count

    def storage_key(self) -> int:
        """Give the identity of the storage that the object lies on; 0 if it lies on none."""
        if self._object is None or self.backing is None or self.state is State.VACANT:
            return 0  # what is lent counts as its user's
        return int(self._object.untyped_storage()._cdata)

    @property
    def root(self) -> Held:
        """The entry that this one is a view of; itself if it is none."""
        root = None if self.backing is None else self.backing.root
        return self if root is None else root

    @property
    def is_kept(self) -> bool:
        """Whether a ``disable_offloading`` context wants it, or a view of it, to stay."""
        return self.keepers > 0 or any(view.keepers for view in self.views or ())

    def _laid_views(self) -> list[Held]:
        """List the views that lie on the object's memory now."""
        if self.views is None:
            return []
        laid = [one for one in self.views if one.state is State.BENEATH and not one.is_lent]
        return [view for view in laid if view.root is self and not view.is_changed()]

    def overlaps(self, other: Held) -> bool:
        """Whether both show bytes of one storage, and neither is known to be a view of the other's.

        To be asked of entries on one storage.
        """
        if State.VACANT in (self.state, other.state) or self.root is other.root:
            return False
        assert self.tensor is not None
        assert other.tensor is not None  # both lie on it
        (start, stop), (begin, end) = span_of(self.tensor), span_of(other.tensor)
        return start < end and begin < stop

    def _is_shared(self) -> bool:
        """Whether other processes may use the memory (``share_memory``, a worker's arguments)."""
        tensor = self.tensor
        return tensor is not None and tensor.is_cpu and tensor.untyped_storage().is_shared()

    def is_changed(self) -> bool:
        """Whether the value differs from the backing's; costs a look at its bytes if LOADED."""
        if self.state is State.VACANT or self.tensor is None:
            return False
        if self.state is State.AS_IS or self.backing is None or self.tensor.is_meta:
            return True
        if self.state is State.FRESH:
            return not self.is_stored()
        if self.backing.layout != (self.tensor.dtype, tuple(self.tensor.shape)):
            return True
        if self.state is State.BENEATH:
            return not self._lies_as_laid(self.tensor) or self.backing.was_edited(self.tensor)
        known = self.check.digest if self.check is not None else b""
        is_stored = partial(self.backing.holds, self.tensor)
        return self._laid.was_edited(self.tensor, is_stored, known)

    def _lies_as_laid(self, tensor: torch.Tensor) -> bool:
        # A view that was given other memory does not keep its root's, so that others may lie at
        # the address that it was laid at: the storage must be the root's too.
        root = self.root
        on_its_root = root is self or int(tensor.untyped_storage()._cdata) == root.storage_key()
        return on_its_root and self._laid.is_there(tensor)

    @property
    def is_marked(self) -> bool:
        """Whether the kernel notes what is written to the value, so that no digest is needed."""
        return self._laid.mark is not None

    def mapped_span(self) -> tuple[int, int] | None:
        """Give the addresses from and to which it lies on its file, just as it was laid there."""
        tensor, backing = self._object, self.backing
        if self.state is not State.BENEATH or tensor is None or backing is None:
            return None
        if backing.memory is not None or backing.root is not None or tensor.is_meta:
            return None
        if backing.layout != (tensor.dtype, tuple(tensor.shape)) or not self._laid.is_there(tensor):
            return None
        address = self._laid.address
        return address, address + tensor.numel() * tensor.dtype.itemsize

    @property
    def requires_grad(self) -> bool:
        """Whether the object takes part in training, now or once it is made."""
        shown = self.tensor if self.tensor is not None else self._template
        return shown is not None and shown.requires_grad

    def is_stored(self) -> bool:
        """Whether the write under way has ended and stored what the object holds now."""
        ticket = self.ticket
        if ticket is None or ticket.stored is None or self.tensor is None:
            return False
        now = (self.tensor.dtype, tuple(self.tensor.shape))
        same = (ticket.stored.dtype, ticket.stored.shape) == now
        return same and digest_of(self.tensor) == ticket.digest


def held_of(tensor: torch.Tensor) -> Held | None:
    """Find the entry that an object, or what stands for it offloaded, belongs to."""
    held = _by_object.get(id(tensor))
    if held is not None and (held.tensor is tensor or held._template is tensor):
        return held
    return None


# An object has one entry, whoever asks: this is how a tie is found when the second of two
# modules is offloaded. Entries are owned by caches; this refers to them weakly.
_by_object: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()

# Of an object beneath which nothing was laid yet.
_NOTHING = Laid(0, (), b"", None)
# What the counts are when nobody holds the object.
_UNHELD = uses_of(Held("", None, tensor=torch.nn.Parameter(torch.zeros(1))))
