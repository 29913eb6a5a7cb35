"""Commit a model: from then on a crash costs nothing of what it holds."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.disk import DiskCache
from diskoffload.committing.shown import faces_of, folder_of, nothing_offloaded
from diskoffload.committing.table import Table
from diskoffload.errors import InvalidInputError
from diskoffload.store.commits import Commits, Committed
from diskoffload.store.journal import Journal
from diskoffload.system.files import Files

_log = logging.getLogger(__name__)


def commit(model: torch.nn.Module, note: Any = None) -> Committed:
    """Make the present value of every tensor of a model durable, at one stroke.

    After a kill, a power cut or an error at any moment, :func:`diskoffload.reopen` gives the
    model as it was at the last commit that returned. Only what has changed since the commit
    before is written: tensors offloaded to disk that are there already are not written again,
    and of an opened checkpoint nothing is that is unchanged. Tensors that the model holds in
    memory (plain modules, ``CPUCache``) are written to the folder as well.

    Beside the writing it costs a walk over the modules, and a look at what was read or assigned
    since the commit before and at what somebody holds. Tensors of plain modules, and values in RAM
    on memory that is not torch's own, are compared with their digest each time. What nobody holds
    is hidden, so that the next read of it is a slow one.

    Args:
        model: a model of which at least some modules are offloaded to disk, all to one folder.
        note: what the caller wants to find again, anything that JSON can say; for example
            the layers that are done. Given back by :func:`diskoffload.last_commit`.

    Returns:
        What was committed; ``number`` counts the folder's commits from 1.

    Raises:
        NotOffloadedError: nothing of the model is offloaded to disk.
        InvalidInputError: its modules are offloaded to several folders, or the note cannot be
            written as JSON.
        CommitError: the folder holds the commits of another model or run.
        ClosedError: the folder was closed, or belongs to the parent process.
        UnsupportedTensorError: a tensor has no value that could be written.
        StorageError: the disk refused. What was committed before is as it was, and once the
            cause is gone the next call commits everything.

    Thread-safe; other threads may read meanwhile, but wait to onload or assign until the values
    are in their files, not until those are durable.
    Commits to one folder wait for each other: the later one has what the earlier one has.
    """
    turn = _turn_of(model)
    try:
        note = json.loads(json.dumps(note))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the note cannot be written as JSON: {error}") from error
    with turn:
        faces = faces_of(model)
        folder = folder_of(model, faces)
        folder.claim_commits(model)
        made = Table(model, folder, faces).commit(note)
    _log.info(
        "commit %d of %s: %d tensors in %d files",
        made.number,
        folder.path,
        len(made.entries),
        len(made.shards),
    )
    return made


def last_commit(where: torch.nn.Module | Path | str) -> Committed:
    """Tell what was committed last; its number is 0 if nothing was.

    Args:
        where: a model, or an offload folder, which may be in use or not be there at all.

    Raises:
        NotOffloadedError: nothing of the model is offloaded to disk.
        InvalidInputError: its modules are offloaded to several folders.
        DamagedFileError: the folder's journal is damaged.
    """
    if isinstance(where, torch.nn.Module):
        return folder_of(where, faces_of(where)).last_commit
    return Commits(Journal(Path(where).expanduser().absolute(), Files())).last


def _turn_of(model: torch.nn.Module) -> threading.Lock:
    """Find whose turn it is to commit; what else the model has is seen only when it is ours."""
    for module in model.modules():
        for cache in (module._parameters, module._buffers):
            if isinstance(cache, DiskCache):
                cache.folder.check_open("a commit")  # a forked child would wait for ever
                return cache.folder.turn
    raise nothing_offloaded(model)
