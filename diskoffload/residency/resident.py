"""What is in memory: who may stay, who leaves first, and what must be written before.

Every slow read and every assignment passes here. A read that finds its object in place
does not.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import get_args

import torch

from diskoffload.budget import format_bytes
from diskoffload.errors import ClosedError, InvalidInputError, OffloadError, StorageError
from diskoffload.residency.allowance import Allowance
from diskoffload.residency.devices import Devices
from diskoffload.residency.edits import unedited
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.forking import quiesce_at_fork
from diskoffload.residency.held import Backing, Held, State
from diskoffload.residency.loaded import Loaded
from diskoffload.residency.mapped import Mapped
from diskoffload.residency.objects import is_ours_to_move, out_of_inference_mode
from diskoffload.residency.parking import Parking
from diskoffload.residency.storages import Storages, become_view, is_another_view, root_of
from diskoffload.residency.streaming import Mode, Streaming
from diskoffload.residency.watching import Watching
from diskoffload.residency.window import Window
from diskoffload.store.pieces import Streamable, pieces_of
from diskoffload.store.writer import Ticket
from diskoffload.system.accelerators import Accelerators
from diskoffload.system.collector import collector_paused
from diskoffload.system.headroom import Headroom
from diskoffload.system.memory import empty, trim_heap

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")

# Mapped tensors that may be edited before anyone looks: at least so much, else this share of
# what is available, and of max_bytes where it is given.
_LEAST_WINDOW_BYTES = 32 << 20
_WINDOW_SHARE = 4
# What keeps an edit in memory until a sync, which tells: a reader of something else is not told.
_CANNOT_WRITE = (ClosedError, StorageError)
# How many entries in use are looked at again per slow operation: keeps each one O(1).
_LOOKS = 4
# How much of the C library's memory is freed before it is asked to give it back (some ms).
_TRIM_BYTES = 16 << 20
# To ask what may be taken costs some tenths of a millisecond, which small entries do not take to
# be read. Our own taking is counted meanwhile, and that of others is followed by who watches.
_BUDGET_FOR_SECONDS = 0.01


class Residency:
    """Keeps the books of one or several models' memory.

    Loaded copies leave as soon as something else is loaded and nothing uses them, unless
    a ``disable_offloading`` context keeps them. Kept ones stay within the budget: the
    smaller of ``max_bytes`` and what the machine and its containers have left. If room is
    short the one loaded first leaves first; what is in use stays whatever the budget,
    because it is the user's.

    Thread-safe.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        headroom: Headroom | None = None,
        mode: Mode = "auto",
        accelerators: Accelerators | None = None,
    ) -> None:
        """Begin with nothing in memory.

        Args:
            max_bytes: what loaded copies may take; ``None``: what is available.
            headroom: tells what is available.
            mode: how weights are held that lie on disk as they are used: ``"mapped"``,
                ``"streamed"``, or ``"auto"``: streamed if they do not fit what is available and
                ``max_bytes`` says what memory of the process's own they may take.
            accelerators: tells what is free on devices, and copies to them.
        """
        self._allowance = Allowance(max_bytes, headroom or Headroom())
        self._foresight = Foresight()
        self._streaming = Streaming(mode, self._foresight)
        self._mapped = Mapped(self._foresight)
        self._devices = Devices(accelerators or Accelerators(), self._foresight)
        self.lock = threading.RLock()
        self.evicted_count = 0
        self.loaded_count = 0
        self._loaded = Loaded()
        self._ahead_budget_bytes = 0
        self._ask_budget_at_seconds = 0.0
        self._known: weakref.WeakSet[Held] = weakref.WeakSet()
        self._storages = Storages()
        self._window = Window()
        # What waits for something: a write to end (filled by the writer's thread), a
        # written object's users to let go of it.
        self._arrived: deque[weakref.ref[Held]] = deque()
        self._lingering: deque[weakref.ref[Held]] = deque()
        self._parking = Parking()
        self._freed_bytes = 0
        self._gives_back = False
        self._watching = Watching(partial(_look_after, weakref.ref(self)))
        quiesce_at_fork(self)

    @property
    def max_bytes(self) -> int | None:
        """What loaded copies may take; ``None``: what is available."""
        return self._allowance.max_bytes

    @max_bytes.setter
    def max_bytes(self, max_bytes: int | None) -> None:
        self._allowance.max_bytes = max_bytes
        self._ask_budget_at_seconds = 0.0

    @property
    def loaded_bytes(self) -> int:
        """Bytes of loaded copies, kept ones included."""
        with self.lock:
            return self._loaded.nbytes

    def expect(self, held: Held) -> None:
        """Note that a module shows an entry, in the order in which modules do."""
        self._foresight.show(held)

    @property
    def streams(self) -> bool:
        """Whether weights are streamed now, rather than mapped."""
        return self._streaming.is_on

    def quiesce(self) -> None:
        """Wait until nothing is being read; the lock is held."""
        self._streaming.quiesce()
        self._devices.quiesce()

    def entries(self) -> list[Held]:
        """List every entry that is bound to a module."""
        with self.lock:
            return [held for held in self._known if held.bindings]

    def known(self) -> list[Held]:
        """List every entry whose books are kept, roots of views and stand-ins' own included."""
        with self.lock:
            return [held for held in self._known if not held.is_lent]

    # ------------------------------------------------------------------ reading

    def onload(self, held: Held, device: torch.device) -> torch.Tensor:
        """Bring an entry's value beneath its object on a device, and publish it."""
        with self.lock:
            self._known.add(held)
            # A tensor made in inference mode would be one for life, and refuse autograd.
            with torch.inference_mode(False):
                self._settle()
                root = held.root
                if root.backing is not None and root.backing.memory is None:
                    self._decide()
                goes_to_one = self._devices.is_one(device)
                is_streamed = not goes_to_one and self._streaming.to_stream(root) is not None
                if is_streamed:
                    self._streaming.note_read(root)
                    if root.state is State.BENEATH:
                        self.vacate_mapped(root)  # from when it was mapped
                if held.state is State.VACANT or self._is_elsewhere(held, device):
                    self._bring(held, device)
                    held.place = device
                root = held.root
                if root.state is State.BENEATH and root.backing and root.backing.memory is None:
                    self._window.enter(root)
                    if root.nbytes > self._allowance.free_bytes():
                        self._make_room_for_an_edit()
                    self._look_at_what_leaves()
                    self._mapped.note_read(root, self._allowance.free_bytes())
                tensor = held.publish()
                if is_streamed and self._streaming.may_look_ahead:
                    self._look_ahead()  # not in the place of this one, which is in use
            return tensor

    def _decide(self) -> None:
        # Only who says how much may be taken knows what else the process will need: a loop that
        # replaces weights was killed in its container where it was taken unasked.
        if self.max_bytes is not None:
            self._streaming.decide(self._room_bytes, self._allowance.explain)

    def _room_bytes(self) -> int:
        return self._allowance.room_bytes(self._ours_bytes())

    def _look_at_what_leaves(self) -> None:
        """Write edits of mapped entries that were not read lately, and have their pages back."""
        available = self._allowance.free_bytes()
        most = available if self.max_bytes is None else min(available, self.max_bytes)
        self._window.shrink(max(_LEAST_WINDOW_BYTES, most // _WINDOW_SHARE), _LOOKS)
        self._write_edits(_LOOKS)

    def _make_room_for_an_edit(self) -> None:
        """Have all edits but of what was read just now written, and wait for that.

        Whoever edits a mapped tensor takes its size of memory, and nobody is asked then.
        """
        self._window.shrink(0, len(self._window))
        self._write_edits(len(self._window))
        under_way = [held for held in self._known if held.ticket is not None]
        with suppress(*_CANNOT_WRITE):  # the edits stay in memory, and sync will tell
            _flush(under_way, self._settle_many)
            self._settle_many()

    def _write_edits(self, most: int) -> None:
        """Look at so many of the entries that left the window, and write those edited."""
        for held in self._window.to_look_at(most):
            if held.state is not State.BENEATH or held.is_lent:
                continue
            held.unpublish()
            if held.is_unheld():
                with suppress(*_CANNOT_WRITE):  # the edit stays in memory, and sync will tell
                    self._write_back(held)
            elif held.is_changed():
                # Writing it would give nothing back as long as its user holds it.
                held.publish()
                self._window.enter(held)

    def _is_elsewhere(self, held: Held, device: torch.device) -> bool:
        if held.is_at(device):
            return False
        try:
            self._write_back(held)
        except ClosedError:  # a child of a fork reads too: the value itself moves then
            held.state = State.FRESH
        return held.backing is not None

    def _bring(self, held: Held, device: torch.device) -> None:
        backing = held.backing
        assert backing is not None  # only AS_IS entries have none, and they are never vacant
        goes_to_one = self._devices.is_one(device)
        stored = None if goes_to_one else self._streaming.to_stream(held)
        if stored is not None and held.state is not State.FRESH:
            self._stream(held, stored)
            return
        lies_elsewhere = goes_to_one and backing.memory is None
        is_fresh = held.state is State.FRESH
        value = None if is_fresh or lies_elsewhere else backing.beneath(device)
        if value is not None:
            held.lay(value, State.BENEATH)
            self._storages.note(held)
            return
        if held.state is State.FRESH:
            assert held.tensor is not None
            held.lay(held.tensor.detach().to(device), State.FRESH)
            return
        dtype, shape = backing.layout
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.make_room(nbytes, device)
        plain = backing.plain_stored
        if plain is not None and self._devices.can(device):
            self._foresight.read(held)
            held.lay(*self._devices.take(held, plain, device))
        else:
            held.lay(backing.load(device), State.LOADED)
        self._note_loaded(held, nbytes)
        self._devices.look_ahead(device, self._loaded)

    def _note_loaded(self, held: Held, nbytes: int) -> None:
        self._storages.note(held)
        self._loaded[held] = nbytes
        self.loaded_count += 1
        self._watching.wake()

    def _stream(self, held: Held, stored: Streamable) -> None:
        nbytes = stored.nbytes
        if not self._streaming.is_ahead(held, stored):
            self.make_room(pieces_of(stored).room_bytes)
        value, fill = self._streaming.take(held, stored, self._look_ahead)
        held.lay(value, State.LOADED, fill.digest, fill.mark)
        held.buffer = fill.buffer
        self._note_loaded(held, nbytes)

    def _look_ahead(self) -> None:
        now_seconds = time.monotonic()
        if now_seconds >= self._ask_budget_at_seconds:
            self._ahead_budget_bytes = self.budget_bytes()
            self._ask_budget_at_seconds = now_seconds + _BUDGET_FOR_SECONDS
        self._streaming.look_ahead(self._ahead_budget_bytes, self._used_bytes(), self)

    def go_on_reading(self) -> None:
        """Begin to read what is next, or have who is in here do it: it never waits."""
        if self.lock.acquire(blocking=False):
            try:
                with suppress(OffloadError):  # whoever needs it will be told
                    self._look_ahead()
            finally:
                self.lock.release()
        else:
            self._streaming.wake()

    def begin_release(self, held: Held) -> int:
        """Hide an entry and begin to look for edits; give its bytes, 0 if it cannot leave.

        What cannot be looked at beside, or need not be, leaves at once. See :class:`Leaving`;
        the lock is held.
        """
        if held.state is not State.LOADED or held.is_lent or not self._withdraw(held):
            return 0
        data = None if held.is_marked else held.as_filled()
        if data is None:
            return self.released_bytes(held)
        go_on = partial(_go_on_reading, weakref.ref(self))
        held.begin_check(self._streaming.check(data, go_on))
        return self._loaded.get(held, 0)

    def released_bytes(self, held: Held) -> int:
        """Take an entry's memory if nothing uses it; give how much that was."""
        nbytes = self._loaded.get(held, 0)
        return nbytes if self.release(held) else 0

    # ------------------------------------------------------------------ leaving

    def budget_bytes(self) -> int:
        """Tell how many bytes of loaded copies may stay now."""
        asked = not self._streaming.is_on
        return self._allowance.budget_bytes(self._ours_bytes(), asked=asked)

    def make_room(self, nbytes: int, device: torch.device = _CPU) -> None:
        """Let loaded copies leave until ``nbytes`` more fit, as far as they can.

        Args:
            nbytes: what is to come.
            device: where to. In RAM it must fit the budget, on an accelerator what that has left.
        """
        with self.lock:
            for held in list(self._loaded):
                if not held.is_kept and self._streaming.to_stream(held) is None:
                    self.release(held)
            if self._devices.is_one(device):
                self._leave_until(self._devices.room(device, nbytes, self._loaded), device)
            # Asking the system costs a little, so only where something could leave.
            elif self._ours_bytes():
                self._fit(nbytes, self.budget_bytes())

    def give_back(self) -> bool:
        """Let what is loaded follow what is available; tell whether there was anything to give."""
        if not self.lock.acquire(blocking=False):
            return True  # whoever has it is loading something, and makes room for it
        try:
            ours_bytes = self._ours_bytes()
            if ours_bytes:
                budget_bytes = self.budget_bytes()
                gives_back = ours_bytes > budget_bytes
                if gives_back:
                    self._streaming.drop_ahead()
                    self._fit(0, budget_bytes)
                    self._look_at_what_leaves()
                if gives_back and not self._gives_back:
                    _log.info(
                        "gave back %s of weights in memory: %s may stay there (%s)",
                        format_bytes(ours_bytes - self._ours_bytes()),
                        format_bytes(budget_bytes),
                        self._allowance.explain(),
                    )
                self._gives_back = gives_back
            return ours_bytes > 0
        finally:
            self.lock.release()

    def _fit(self, nbytes: int, budget_bytes: int) -> None:
        """Let what is needed last leave, until so many more bytes fit the budget."""
        self._leave_until(self._used_bytes() + nbytes - budget_bytes, _CPU)
        left_bytes = budget_bytes - self._used_bytes() - nbytes
        self._streaming.buffers.shrink(left_bytes, spare_bytes=nbytes)

    def _leave_until(self, wanted_bytes: int, device: torch.device) -> None:
        """Let what is needed last leave a device, until so many bytes are free again."""
        if wanted_bytes <= 0:
            return
        there = [held for held in self._loaded if self._devices.is_on(held, device)]
        is_streamed = self._streaming.is_on and not self._devices.is_one(device)
        sort = self._foresight.latest_needed_first
        if is_streamed:
            sort = self._foresight.leaving_first
            there += self._streaming.ahead()
        for held in sort(there):
            freed_bytes = self._streaming.give_up(held) or self.released_bytes(held)
            wanted_bytes -= freed_bytes
            self.evicted_count += freed_bytes > 0
            if wanted_bytes <= 0:
                break

    def _used_bytes(self) -> int:
        in_ram_bytes = self.loaded_bytes - self._devices.loaded_bytes(self._loaded)
        return in_ram_bytes + self._streaming.ahead_bytes

    def _ours_bytes(self) -> int:
        return self._used_bytes() + self._streaming.buffers.free_bytes

    def release(self, held: Held) -> bool:
        """Take a loaded copy's memory, unless something uses it; an edit is written first."""
        with self.lock:
            if held.state is not State.LOADED or held.is_lent:
                self._loaded.pop(held, None)
                return False
            if not self._withdraw(held):
                return False
            try:
                self._write_back(held)  # does nothing if nothing was changed
            except _CANNOT_WRITE:
                held.publish()  # whoever reads another tensor is not to be told: sync will
                return False
            self._loaded.pop(held, None)
            if held.state is State.LOADED:
                buffer = held.buffer
                held.vacate()
                if buffer is not None:
                    self._streaming.buffers.give(buffer)
            else:
                held.publish()  # readable until it is written; the writer's queue is bounded
            return True

    def hand_over(self, held: Held, heir: Residency) -> None:
        """Have another keep an entry's books from now on; what nothing uses leaves memory."""
        with self.lock, heir.lock:
            self.release(held)
            nbytes = self._loaded.pop(held, None)
            self._known.discard(held)
            heir._known.add(held)
            if nbytes is not None:
                heir._devices.is_one(held.place or _CPU)  # it counts what is on one
                heir._loaded[held] = nbytes

    def vacate_mapped(self, held: Held) -> bool:
        """Take a file's mapping from beneath an entry, unless something uses it.

        Tell whether it does not lie on the file now, so that its value may be put elsewhere.
        """
        with self.lock:
            if held.state is State.BENEATH and not held.is_lent and self._withdraw(held):
                if held.root is not held or held.is_changed():
                    held.publish()
                else:
                    held.vacate()
            return held.state in (State.VACANT, State.LOADED)

    def _withdraw(self, held: Held) -> bool:
        """Hide an entry from readers, unless something uses it."""
        for view in list(held.views or ()):
            if view.root is held and is_another_view(view):  # it goes where this one goes
                self._became_view(view)
        held.unpublish()
        if held.is_unheld():
            return True
        # Perhaps only other entries use it: it may lie on another memory than was noted.
        try:
            became_view = self._became_view(held)
        except _CANNOT_WRITE:  # its root stays in memory, and sync will tell
            became_view = True
        if not became_view and held.mates is not None and held.is_unheld():
            return True
        held.publish()
        return False

    def release_kept(self, kept: list[Held]) -> None:
        """End one context's wish to keep these, and let go what nothing uses."""
        with self.lock:
            for held in kept:
                held.keepers -= 1
                if not held.root.is_kept:
                    self.release(held.root)

    # ------------------------------------------------------------------ writing

    def adopt(self, held: Held, *, write: bool) -> None:
        """Keep an entry's books from now on; write its value behind the caller's back."""
        with self.lock, out_of_inference_mode():
            self._known.add(held)
            if self._became_view(held):
                return
            if write and held.tensor is not None:
                # Whoever made it has most likely freed as much on the way.
                self._freed_bytes += held.nbytes
            self._settle()
            if write:
                self._write(held)

    def _became_view(self, held: Held) -> bool:
        """Tie an entry to the one whose bytes its value shares, if there is one."""
        if is_another_view(held):
            become_view(held, held.root, self)
            held.publish()
            return True
        mate = self._storages.note(held)
        if mate is None:
            return False
        root = root_of(mate, self)
        become_view(held, root, self)
        if root is not mate:
            self._known.add(root)
            self._storages.note(root)
            if mate in self._loaded:
                self._loaded[root] = self._loaded.pop(mate)
            if root.ticket is not None:
                root.ticket.notify(partial(self._arrived.append, weakref.ref(root)))
            elif root.state is State.FRESH:
                self._write_back(root)
        held.publish()
        return True

    def _write_back(self, held: Held) -> None:
        if held.state in (State.VACANT, State.AS_IS) or held.backing is None:
            return
        assert held.tensor is not None  # only vacant entries may have no object yet
        if not is_ours_to_move(held.tensor):
            held.let_go()  # a graph's result was put into it, or it was swapped for a meta tensor
            return
        if held.state is State.BENEATH and not held.is_changed():
            return
        if held.state is State.LOADED and not held.is_changed():
            return
        if not self._became_view(held):
            self._write(held)

    def _write(self, held: Held) -> None:
        """Have the backing take an entry's value, which nothing else lies on."""
        assert held.tensor is not None
        assert held.backing is not None
        if held.ticket is not None:
            held.ticket.cancel()  # before it is begun for want of room
        outcome = held.backing.rewrite(held.name, held.tensor.detach())
        if isinstance(outcome, Ticket):
            if held.root is not held:
                held.stand_alone()
            held.state = State.FRESH
            held.ticket = outcome
            outcome.notify(partial(self._arrived.append, weakref.ref(held)))
        else:
            held.state = State.FRESH
            held.ticket = None
            held.backing = outcome
            value = outcome.beneath(held.tensor.device)
            held.lay(held.tensor, State.BENEATH if value is not None else State.LOADED)

    def postpone(self, held: Held | None) -> None:
        """Leave it to the next sync to write an entry that is about to be replaced."""
        if held is None:
            return
        with self.lock:
            if held.ticket is None or held.views is not None:
                return
            if len(held.bindings) == 1:  # else others show it too
                held.ticket.cancel()

    def update(self, held: Held, data: torch.Tensor, device: torch.device) -> None:
        """Give an entry the value of ``data`` at this moment, as ``copy_`` would.

        Raises:
            RuntimeError: shapes that do not broadcast, as ``Tensor.copy_`` does.
            ClosedError: the folder was closed. In both cases nothing was changed.
        """
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if held.backing is not None:
                held.backing.check_open(held.name)
            self.onload(held, device)
            if not self._renew(held, data):
                assert held.tensor is not None  # it was onloaded
                held.tensor.copy_(data)
            if held.state is not State.AS_IS:
                self._write_back(held.root)

    def _renew(self, held: Held, data: torch.Tensor) -> bool:
        """Lay new memory with a new value beneath an unheld object that a file lies beneath.

        Copying into it would cost the kernel's private copy of every page, for as long as
        the file is mapped.
        """
        if (
            held.state is not State.BENEATH
            or held.backing is None
            or held.backing.memory is not None
            or held.root is not held
            or held.views is not None
        ):
            return False
        held.unpublish()
        unheld = held.is_unheld()
        tensor = held.publish()
        if unheld:
            fresh = empty(tensor.dtype, tuple(tensor.shape))
            fresh.copy_(data)
            held.lay(fresh, State.FRESH)
        return unheld

    def _settle(self) -> None:
        """Act on writes that have ended, and look again at a few that were in use before."""
        for waiting, most in ((self._arrived, len(self._arrived)), (self._lingering, _LOOKS)):
            for _ in range(min(most, len(waiting))):
                held = waiting.popleft()()
                if held is not None and not self._settle_one(held):
                    self._lingering.append(weakref.ref(held))
        if self._freed_bytes >= _TRIM_BYTES:
            self._freed_bytes = 0
            trim_heap()
        self._parking.look_again(_LOOKS)

    def _settle_one(self, held: Held) -> bool:
        """Put the stored value beneath an object; tell whether nothing remains to be done."""
        ticket = held.ticket
        if held.state is not State.FRESH or ticket is None or ticket.stored is None:
            return True
        if held.is_lent:
            return True  # looked at when it comes back
        assert held.backing is not None
        assert held.tensor is not None
        if not self._withdraw(held):
            return held.state is not State.FRESH
        if not held.is_stored():
            with suppress(*_CANNOT_WRITE):
                self._write_back(held)
            held.publish()
            return True
        before, held.backing, held.ticket = held.backing, held.backing.succeed(ticket), None
        address, nbytes = held.tensor.data_ptr(), held.nbytes
        self._freed_bytes += nbytes
        # The file is laid beneath it at the next read, which has to ask anyway: of thousands that
        # are written at once it may be a long time until each is read.
        held.vacate()
        before.forget_edits(address, nbytes)
        return True

    def park(self, held: Held) -> None:
        """Remember an entry that no module shows now, for as long as its object is in use.

        Whoever puts the object back gets its entry back. Until then nobody else reads it, so
        nothing of it is moved or written.
        """
        with self.lock:
            self._parking.enter(held)
            if held.is_lent:
                self._loaded.pop(held, None)

    def unpark(self, held: Held) -> None:
        """Go on with a parked entry, because a module shows it again."""
        with self.lock:
            if self._parking.leave(held):
                self._became_view(held)  # of what was put onto its memory meanwhile
                if held.state is State.LOADED:
                    self._loaded[held] = held.nbytes
                self._arrived.append(weakref.ref(held))

    def _settle_many(self) -> None:
        with collector_paused():  # not while the disk is waited for, which may be minutes
            self._settle()

    def sync(self, selects: Callable[[Held], bool]) -> set[Held]:
        """Write what was changed in any way, and return when it is written.

        Args:
            selects: which entries are meant.

        Returns:
            Those of them that were seen to lie on their file unchanged.

        Raises:
            ClosedError: a folder that changes belong in was closed.
            StorageError: a write failed; the values are still held, and a later call tries
                again.
        """
        with self.lock:
            chosen = [held for held in self.known() if selects(held)]
            same = unedited(chosen)
            if same is None:
                same = set()
                # What is compared now and left there would be compared again at each sync.
                for held in chosen:
                    if held.mapped_span() is not None:
                        self.vacate_mapped(held)
            for held in chosen:
                if held in same:
                    continue
                ticket = held.ticket
                lost = ticket is None or ticket.cancelled
                late = ticket is not None and ticket.stored is not None and not held.is_stored()
                if held.state is not State.FRESH or lost or late:
                    self._write_back(held)
            # Roots of what was found only now to lie on one memory; FRESH ones are on their way.
            roots = {held.root for held in chosen}.difference(chosen)
            for root in roots:
                if root.state is not State.FRESH:
                    self._write_back(root)
            chosen += roots
            _flush(chosen, self._settle_many)
            self._settle_many()
            # A write that had begun before this call may have stored an older value. What was
            # settled just now was compared with its digest there.
            older = [held for held in chosen if held.state is State.FRESH and not held.is_stored()]
            for held in older:
                if held.ticket is None or held.ticket.cancelled or held.ticket.stored is not None:
                    self._write_back(held)
            if older:
                _flush(older, self._settle_many)
                self._settle_many()
            return same


def _flush(entries: list[Held], meanwhile: Callable[[], object]) -> None:
    under_way = [held.ticket.folder for held in entries if held.ticket is not None]
    for folder in {id(one): one for one in under_way if one is not None}.values():
        folder.flush(meanwhile)


def current_value(held: Held) -> tuple[Backing | None, torch.Tensor | None]:
    """Tell where an entry's value is now: unchanged in its backing, or in its object only."""
    if held.backing is not None and not held.is_changed():
        if held.state is State.FRESH and held.ticket is not None:
            return held.backing.succeed(held.ticket), None
        return held.backing, None
    return None, held.tensor


def _go_on_reading(ref: weakref.ref[Residency]) -> None:
    residency = ref()
    if residency is not None:
        residency.go_on_reading()


def _look_after(ref: weakref.ref[Residency]) -> bool:
    residency = ref()
    return residency is not None and residency.give_back()


default_residency = Residency()
"""Memory is the process's, so one object watches all of it unless another is handed in."""


def residency_for(max_bytes: int | None, mode: Mode) -> Residency:
    """Give the books for a model: the process's, unless it wants a budget or mode of its own.

    Raises:
        InvalidInputError: no such mode.
    """
    if mode not in get_args(Mode):
        raise InvalidInputError(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if max_bytes is None and mode == "auto":
        return default_residency
    return Residency(max_bytes, mode=mode)
