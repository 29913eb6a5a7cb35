"""Entries that no module shows now, but whose object somebody has and may put back.

``torch.func.functional_call`` takes every object out of its module and puts it back
afterwards: each must find its entry again, or its value would be written anew.
"""

from __future__ import annotations

from itertools import islice

from diskoffload.residency.held import Held


class Parking:
    """The entries that wait. Guarded by the residency's lock.

    An entry goes with its object, whenever that is. Only while somebody has what stands for
    the object offloaded it is looked at now and then whether that is still so.
    """

    def __init__(self) -> None:
        self._lent: dict[int, Held] = {}
        self._out: dict[Held, None] = {}

    def enter(self, held: Held) -> None:
        """Keep an entry for as long as it can come back."""
        # What is as it is has nothing to come back to: a later binding makes its entry anew.
        if held.backing is None or held.bindings or held.tensor is None:
            return
        if held.standin_is_out():
            self._out[held] = None
        elif not held.is_unheld():
            # Another thread may let the object go at any time; this needs no lock.
            key = id(held)
            self._lent[key] = held
            held.lend(lambda: self._lent.pop(key, None))

    def leave(self, held: Held) -> bool:
        """Forget an entry because a module shows it again; tell whether its object was lent."""
        self._out.pop(held, None)
        if self._lent.pop(id(held), None) is None:
            return False
        held.take_back()
        return True

    def look_again(self, most: int) -> None:
        """See whether entries whose stand-in was out can still come back."""
        if not self._out:
            return
        for held in list(islice(self._out, most)):
            del self._out[held]
            self.enter(held)
