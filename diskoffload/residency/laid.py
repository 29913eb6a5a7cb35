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
        """Whether a tensor lies on that memory still, as it was laid."""
        return tensor.data_ptr() == self.address and tensor.stride() == self.strides

    def was_edited(
        self, tensor: torch.Tensor, load: Callable[[], torch.Tensor], known_digest: bytes = b""
    ) -> bool:
        """Tell whether a value of its own memory is another one now.

        Args:
            tensor: the value, of the same dtype and shape.
            load: gives the value as it was before; called where nothing else tells.
            known_digest: of the value's bytes now, if that was made already.
        """
        if tensor.stride() != self.strides:
            return True
        written = self._was_written(tensor)
        if written is False:
            return False
        before = self.digest
        if self.mark is not None and not before:
            if written:
                return True
            before = digest_of(load())  # a forked child is not told by the kernel
        return (known_digest or digest_of(tensor)) != before

    def _was_written(self, tensor: torch.Tensor) -> bool | None:
        """Whether the kernel tells that the memory was written to, or that it is another one."""
        if self.mark is None:
            return None
        if tensor.data_ptr() != self.address or tensor.is_conj() or tensor.is_neg():
            return True  # it was given another memory, or a view of this one as its value
        return self.mark.was_written()
