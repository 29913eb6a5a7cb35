"""Tensors that transformers' own code must compute from what a checkpoint stores.

Nearly every conversion only moves elements and is a recipe. One that computes is run once,
at opening, group after group, and its results are written to the offload folder: the one
case in which opening takes time and disk. At saving, what was not changed is the source's
bytes again; what was goes back through transformers' code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from diskoffload.budget import format_bytes
from diskoffload.checkpoint.publish import check_space
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CheckpointMismatchError, UnsupportedTensorError, listed
from diskoffload.integrations.transformers_conversion import Conversion, revert
from diskoffload.store.compression import Compression
from diskoffload.store.folder import Folder
from diskoffload.store.stored import CastTensor, Stored

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """One group of tensors as it was made at opening.

    Attributes:
        sources: names of the stored tensors it was made of.
        tensors: by name in the model, the value as it was written to the offload folder.
    """

    sources: tuple[str, ...]
    tensors: Mapping[str, Stored]


def convert_all(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    conversions: list[Conversion],
    folder: Folder,
    compression: Compression,
) -> list[Converted]:
    """Compute what has no recipe, one group in memory at a time, into the offload folder.

    Raises:
        NoSpaceError: the folder's disk has too little room; nothing was written.
        UnsupportedTensorError: transformers' code fails.
        CheckpointMismatchError: a result has another shape than the model's tensor.
        StorageError: writing failed.
    """
    if not conversions:
        return []
    slots = model.state_dict(keep_vars=True)
    names = [name for conversion in conversions for name in conversion.targets]
    nbytes = sum(slots[name].nbytes for name in names)
    check_space(folder.path, nbytes)
    _log.warning(
        "%d of the model's tensors cannot be read where they lie, because transformers computes "
        "them (%s): converting %s and the like now, which takes %s of disk in %s",
        len(names),
        conversions[0].reason,
        conversions[0].sources[0],
        format_bytes(nbytes),
        folder.path,
    )
    waiting = []
    for conversion in conversions:
        made = _convert(conversion, model, slots, checkpoint)
        tickets = {name: folder.put(name, value, compression) for name, value in made.items()}
        waiting.append((conversion.sources, tickets))
    folder.flush()
    converted = []
    for sources, tickets in waiting:
        tensors = {name: ticket.stored for name, ticket in tickets.items()}
        converted.append(Converted(sources, {name: one for name, one in tensors.items() if one}))
    return converted


def _convert(
    conversion: Conversion,
    model: torch.nn.Module,
    slots: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
) -> dict[str, torch.Tensor]:
    dtype = slots[conversion.targets[0]].dtype

    def read(name: str) -> torch.Tensor:
        # Fresh memory: foreign code may write to what it is given.
        value = checkpoint.tensors[name].load()
        return value.to(dtype) if value.is_floating_point() and dtype.is_floating_point else value

    with torch.no_grad():
        made = conversion.run(model, read)
    absent = [name for name in conversion.targets if name not in made]
    faults = [f"{name} (not made)" for name in absent]
    faults += [
        f"{name} ({list(made[name].shape)} made, {list(slots[name].shape)} in the model)"
        for name in conversion.targets
        if name in made and made[name].shape != slots[name].shape
    ]
    if faults:
        raise CheckpointMismatchError(
            f"{checkpoint.path} and the model do not fit; converting {conversion.sources[0]!r} "
            f"and the like gave {listed(faults)}; open it with the model it was saved from"
        )
    return {name: made[name].to(slots[name].dtype).contiguous() for name in conversion.targets}


class Reverted:
    """The stored tensors of one group, computed back when the first of them is asked for.

    Attributes:
        planned: by stored name, dtype and shape; ``None`` if transformers has no way back.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layouts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        """Find out what would be made.

        Args:
            model: the model.
            layouts: by name in the model, dtype and shape of the tensors of the group.
            read: gives the value of one of them.
        """
        self._model = model
        self._names = list(layouts)
        self._read = read
        self._made: dict[str, torch.Tensor] = {}
        self.planned: dict[str, tuple[torch.dtype, tuple[int, ...]]] | None = None
        empty = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in layouts.items()
        }
        try:
            made = revert(model, empty)
        except UnsupportedTensorError as error:
            _log.warning("%s; they are saved under the model's own names", error)
            return
        self.planned = {name: (one.dtype, tuple(one.shape)) for name, one in made.items()}

    def take(self, name: str) -> torch.Tensor:
        """Give one stored tensor; once each, so that only one group is in memory."""
        if name not in self._made:
            with torch.no_grad():
                self._made = revert(self._model, {one: self._read(one) for one in self._names})
        return self._made.pop(name)


def in_dtype(stored: Stored, dtype: torch.dtype) -> Stored:
    """Read a stored tensor as a dtype, converting only if it has another floating one."""
    if stored.dtype == dtype or not (stored.dtype.is_floating_point and dtype.is_floating_point):
        return stored
    return CastTensor(stored, dtype)
