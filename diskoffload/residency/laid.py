"""What is remembered of a value as it was laid beneath an object: it tells edits later."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from diskoffload.store.writer import digest_of
from diskoffload.system.write_watch import Mark


class Laid(NamedTuple):
    """A value as it lay there.

    Attributes:
        address: where.
        strides: of its elements.
        digest: of its bytes; empty where they are mapped, or marked and not digested.
        mark: by which the kernel tells whether its memory was written to, if it does.
    """

    address: int
    strides: tuple[int, ...]
    digest: bytes
    mark: Mark | None

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on that memory still, as it was laid.

        Of a view that negates or conjugates, the value is not what lies there.
        """
        lies_there = tensor.data_ptr() == self.address and tensor.stride() == self.strides
        return lies_there and not tensor.is_conj() and not tensor.is_neg()

    def was_edited(
        self, tensor: torch.Tensor, is_stored: Callable[[], bool], known_digest: bytes = b""
    ) -> bool:
        """Tell whether a value of its own memory is another one now.

        Args:
            tensor: the value, of the same dtype and shape.
            is_stored: compares it with what is stored; called where nothing else tells.
            known_digest: of the value's bytes now, if that was made already.
        """
        if tensor.stride() != self.strides:
            return True
        if self._was_written(tensor) is False:
            return False
        if self.digest:
            return (known_digest or digest_of(tensor)) != self.digest
        # It was written to, perhaps with the same bytes; or a forked child is told nothing.
        return not is_stored()

    def _was_written(self, tensor: torch.Tensor) -> bool | None:
        """Whether the kernel tells that the memory was written to, or that it is another one."""
        if self.mark is None:
            return None
        return True if not self.is_there(tensor) else self.mark.was_written()
