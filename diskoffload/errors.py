"""Every exception this package raises on purpose.

::

    OffloadError
    +-- InvalidInputError (ValueError)         an argument that cannot be meant
    +-- AlreadyOffloadedError (ValueError)     a module offloaded twice
    +-- NotOffloadedError (ValueError)         an offloaded module was needed
    +-- ClosedError (RuntimeError)             the owner was closed before
    +-- UnsupportedError (RuntimeError)        an offloaded module cannot do this
    +-- MissingExtraError (ImportError)        an optional dependency is absent
    +-- UnsupportedTensorError (TypeError)     a tensor that cannot be stored
    +-- BudgetError (MemoryError)              it cannot fit, whatever leaves
    +-- StorageError (OSError)                 the disk, or what lies on it
        +-- NoSpaceError                       the disk is full, or would be
        +-- FolderInUseError                   another process owns the folder
        +-- OutputExistsError (FileExistsError)  the result's place is taken
        +-- DamagedFileError (ValueError)      not what its format demands
        +-- CommitError (ValueError)           what was committed is not what is asked for
        +-- CheckpointError (ValueError)       a checkpoint that does not fit
            +-- CheckpointMismatchError        names, shapes or dtypes differ

Each also derives from the built-in that a caller would expect. A name that a mapping
does not hold stays a plain :class:`KeyError`. A message says what was tried, what was
found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

_MOST_NAMED = 20
_MOST_CHARACTERS = 120


class OffloadError(Exception):
    """Root of every exception that diskoffload raises on purpose."""


class InvalidInputError(OffloadError, ValueError):
    """An argument was refused before anything was done."""


class AlreadyOffloadedError(OffloadError, ValueError):
    """A module was offloaded although it already is."""


class NotOffloadedError(OffloadError, ValueError):
    """An offloaded module was needed and a plain one was given."""


class ClosedError(OffloadError, RuntimeError):
    """The object was closed; its held tensors stay readable, it takes no more."""


class UnsupportedError(OffloadError, RuntimeError):
    """Something that only a plain module can do was asked of an offloaded one."""


class MissingExtraError(OffloadError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class UnsupportedTensorError(OffloadError, TypeError):
    """A tensor of a kind that cannot be stored; nothing was changed."""


class BudgetError(OffloadError, MemoryError):
    """Something is larger than every place that could hold it."""


class StorageError(OffloadError, OSError):
    """A file operation failed; the folder is left at its last good state."""


class NoSpaceError(StorageError):
    """The file system has not the room that is needed."""


class FolderInUseError(StorageError):
    """Another process owns the offload folder."""


class OutputExistsError(StorageError, FileExistsError):
    """The place where a result should go is taken."""


class DamagedFileError(StorageError, ValueError):
    """A file breaks the rules of its own format."""


class CommitError(StorageError, ValueError):
    """Nothing was committed, or it belongs to another model, source or run."""


class CheckpointError(StorageError, ValueError):
    """A checkpoint cannot be used."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint and a model name different tensors, shapes or dtypes."""


def listed(names: Sequence[str]) -> str:
    """Name the first few of many for a message, and say how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(_shown, names[:_MOST_NAMED])) + more


def _shown(name: str) -> str:
    """Show a name that may come from anyone's file."""
    if name.isprintable() and len(name) <= _MOST_CHARACTERS:
        return name
    return f"{name[:_MOST_CHARACTERS]!a}{'...' if len(name) > _MOST_CHARACTERS else ''}"
