"""Deep copies of entries: independent of the original, and lazy where the value is on disk."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from diskoffload.residency.held import Backing, Held, held_of
from diskoffload.residency.objects import object_like
from diskoffload.residency.resident import current_value
from diskoffload.residency.storages import ViewBacking


def twin_once(held: Held, entry_of: Callable[[torch.Tensor], Held], memo: dict[int, Any]) -> Held:
    """Copy an entry, or give the copy that was made already: ties stay ties.

    Args:
        held: the entry.
        entry_of: makes an entry of a value in memory.
        memo: :mod:`copy`'s.
    """
    twin: Held | None = memo.get(id(held))
    if twin is None:
        # A plain module that shares the object may have been copied before.
        copied = None if held.tensor is None else memo.get(id(held.tensor))
        twin = None if copied is None else held_of(copied) or entry_of(copied)
        twin = memo[id(held)] = twin or _twin(held, entry_of, memo)
    return twin


def _twin(held: Held, entry_of: Callable[[torch.Tensor], Held], memo: dict[int, Any]) -> Held:
    backing, changed = current_value(held)
    if isinstance(backing, ViewBacking):
        root = twin_once(held.root, entry_of, memo)
        if root.views is None:
            root.views = weakref.WeakSet()
        twin: Backing | None = backing.over(root)
    else:
        # Torch closes those of a Parameter that it copies, and leaves those of other tensors.
        gaps = not isinstance(held.offloaded, torch.nn.Parameter)
        twin = None if backing is None else backing.twin(memo, gaps=gaps)
    if twin is not None:
        template = copy.deepcopy(held.offloaded)
        vacant = object_like(template, torch.empty(0, dtype=template.dtype))
        made = Held(held.name, twin, tensor=vacant, template=template)
    else:
        # What has no twin has its value in memory, its object's or the backing's own.
        value = changed if changed is not None else held.offloaded
        made = entry_of(copy.deepcopy(value, memo))
    if held.tensor is not None:
        memo[id(held.tensor)] = made.tensor
    return made
