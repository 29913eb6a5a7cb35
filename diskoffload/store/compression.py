"""What a user says of compression, and what that means for one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from diskoffload.errors import InvalidInputError
from diskoffload.store.codec import codec_named

AUTO = "auto"
DEFAULT = "zstd"


class Layout(Protocol):
    """What is known of a tensor without its value; a tensor has it."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""


Choice = bool | str | None
Chooser = Callable[[str, Layout], Choice]
Compression = str | Chooser | None
"""``None``; ``"zstd"``; ``"auto"``: if the folder's disk is slower than decoding is; or a function
that is given a tensor's full name and the tensor, or something else with its ``dtype`` and
``shape``, and says one of these words, or ``True`` for ``"zstd"`` and ``False`` for ``None``."""


def check_compression(compression: Compression) -> None:
    """Refuse what cannot be meant.

    Raises:
        InvalidInputError: neither ``None``, nor a way to compress that is known, nor a function.
    """
    if compression is None or callable(compression) or _is_auto(compression):
        return
    codec_named(compression)


def way_for(compression: Compression, name: str, tensor: Layout) -> str | None:
    """Tell how one tensor is to be compressed: ``None``, ``"auto"`` or a codec's name.

    Whatever a function raises is raised.

    Raises:
        InvalidInputError: it is, or a function says, what cannot be meant.
    """
    if not callable(compression):
        check_compression(compression)
        return compression
    said = compression(name, tensor)
    if isinstance(said, bool) or said is None:
        return DEFAULT if said else None
    try:
        if not _is_auto(said):
            codec_named(said)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"the function given as compression says {said!r} of {name!r}: {error}"
        ) from error
    return said


def _is_auto(said: object) -> bool:
    return isinstance(said, str) and said == AUTO
