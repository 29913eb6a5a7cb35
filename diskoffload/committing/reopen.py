"""Go on from the last commit of an offload folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from diskoffload.cache.base import Device
from diskoffload.cache.disk import DiskCache
from diskoffload.checkpoint.fingerprint import check_fingerprint
from diskoffload.checkpoint.open import open_checkpoint
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.committing.overlay import Overlay
from diskoffload.errors import (
    AlreadyOffloadedError,
    CommitError,
    InvalidInputError,
    StorageError,
    listed,
)
from diskoffload.module import attach_caches, is_offloaded
from diskoffload.planning import parse_bytes
from diskoffload.residency.resident import Residency, residency_for
from diskoffload.residency.streaming import Mode
from diskoffload.store.commits import Commits, Committed
from diskoffload.store.compression import Compression
from diskoffload.store.folder import Folder, open_committed
from diskoffload.store.journal import JOURNAL_NAME, Journal
from diskoffload.store.open_folders import open_folders
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files, naming_faults

_log = logging.getLogger(__name__)
Verify = Literal["full", "first_read"]
# How often a commit that is replaced while it is read is read again.
_MOST_TRIES = 20


def reopen(
    offload_dir: Path | str,
    *,
    model: torch.nn.Module | None = None,
    source: Path | str | None = None,
    onload_device: Device = "cpu",
    max_memory: int | str | None = None,
    compression: Compression = None,
    align: bool = False,
    mode: Mode = "auto",
    verify: Verify | None = None,
    read_only: bool = False,
) -> torch.nn.Module:
    """Give a model as it was at the last commit of an offload folder.

    Only the journal and headers are read; weights are mapped when they are used. Nothing of
    what was done after the commit is there, whatever became of the process that did it.

    Args:
        offload_dir: the folder; this process owns it from now on.
        model: a model built as the committed one was when it was opened or offloaded, best on
            the meta device; changed in place. Without it the transformers class is built that
            the source checkpoint's ``config.json`` names.
        source: where the checkpoint is that the model was opened from, if it was moved since.
        onload_device: where modules run.
        max_memory: bytes for copies in RAM, as of :func:`diskoffload.open_checkpoint`.
        compression: as for :class:`DiskCache`, for what is written from now on.
        align: as of :func:`diskoffload.open_checkpoint`.
        mode: as of :func:`diskoffload.open_checkpoint`.
        verify: ``"full"`` compares every committed tensor with its checksum now, which reads
            all of them; ``"first_read"`` each one before it is read first. Journal, headers
            and lengths are always checked, and what is decoded or copied is always compared.
        read_only: take what was committed last while another process may own the folder and
            go on committing; changes go to a temporary folder, and are gone at the end.

    Returns:
        The model, every tensor of it offloaded to disk. It owns the folder and the mappings.

    Raises:
        CommitError: nothing was committed there; or what was committed is not this model's
            (names, shapes or dtypes differ), or its source was changed or replaced.
        CheckpointError: the source is not where it was; name it as ``source``.
        DamagedFileError: the journal or a file is not what was written.
        FolderInUseError: another process owns the folder.
        InvalidInputError: a model is needed and none was given.
        AlreadyOffloadedError: ``model`` is offloaded.
    """
    if verify not in (None, "full", "first_read"):
        raise InvalidInputError(f'verify is "full", "first_read" or None, not {verify!r}')
    place = _committed_place(offload_dir)
    if read_only:
        folder = Folder(is_named=False)
        committed, shards = _read_without_lock(place)
        folder.show_only(committed)
    else:
        folder = open_folders.at(place)
        committed = folder.last_commit
        shards = {name: folder.committed_shard(name) for name in committed.shards}
    _check_any(committed, place)
    for shard in shards.values():
        shard.check_first_reads(verify == "first_read")
        for tensor in stored_tensors(shard).values() if verify == "full" else ():
            shard.verify(tensor.spec, tensor.digest)
    options: dict[str, Any] = {"onload_device": onload_device, "compression": compression}
    if committed.source is not None:
        dtype = committed.source["dtype"]
        made = open_checkpoint(
            _source_of(committed, place, source),
            model=model,
            offload_dir=folder,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_memory=max_memory,
            align=align,
            mode=mode,
            **options,
        )
        mine: Any = made._parameters
        residency: Residency = mine.residency
    else:
        residency = residency_for(None if max_memory is None else parse_bytes(max_memory), mode)
        made = _from_model(
            committed,
            place,
            model,
            source,
            {**options, "residency": residency, "offload_dir": folder},
        )
    Overlay(made, folder, shards.__getitem__, residency, compression, align).lay(committed.entries)
    if not read_only:
        folder.claim_commits(made, reopened=True)
    _log.info(
        "reopened commit %d of %s: %d tensors of its own in %d files",
        committed.number,
        place,
        len(committed.entries),
        len(committed.shards),
    )
    return made


def _committed_place(offload_dir: Path | str) -> Path:
    if not isinstance(offload_dir, (str, Path)):
        raise InvalidInputError(f"offload_dir must be a path, not {type(offload_dir).__name__}")
    place = Path(offload_dir).expanduser().absolute()
    with naming_faults("look for the journal", place):
        is_there = (place / JOURNAL_NAME).is_file()
    if not is_there:
        Commits(Journal(place, Files()))  # says so if it was lost
        raise CommitError(
            f"nothing was committed in {place}: it has no {JOURNAL_NAME}; open the checkpoint "
            "or offload the model anew, and commit it"
        )
    return place


def _check_any(committed: Committed, place: Path) -> None:
    if not committed.number:
        raise CommitError(
            f"nothing was committed in {place}: its journal has no whole record; open the "
            "checkpoint or offload the model anew, and commit it"
        )


def _read_without_lock(place: Path) -> tuple[Committed, dict[str, Shard]]:
    """Open what was committed last, though its owner may replace it meanwhile."""
    files = Files()
    for _ in range(_MOST_TRIES):
        committed = Commits(Journal(place, files)).last
        try:
            shards = {
                name: open_committed(place, name, committed, files) for name in committed.shards
            }
        except StorageError as error:
            if Commits(Journal(place, files)).last.number == committed.number:
                raise  # it was not the owner who took it away
            last_error = error
            continue
        for shard in shards.values():
            shard.rest(keep=True)  # what its owner removes meanwhile stays readable
        return committed, shards
    raise last_error


def _source_of(committed: Committed, offload_dir: Path, source: Path | str | None) -> Path:
    """Find the checkpoint that a commit belongs to, and check that it is the one it was."""
    assert committed.source is not None
    before = Path(committed.source["path"])
    place = before if source is None else Path(source).expanduser().absolute()
    if not place.exists():
        raise CommitError(
            f"the commit in {offload_dir} belongs to the checkpoint {place}, which is not there; "
            "name the place it was moved to as source"
        )
    moved_from = before if source is not None else None
    check_fingerprint(Checkpoint(place), committed.source["files"], moved_from=moved_from)
    return place


def _from_model(
    committed: Committed,
    place: Path,
    model: torch.nn.Module | None,
    source: Path | str | None,
    options: Mapping[str, Any],
) -> torch.nn.Module:
    if source is not None:
        raise InvalidInputError(
            f"the commit in {place} belongs to no checkpoint; leave source={str(source)!r} out"
        )
    if model is None:
        raise InvalidInputError(
            f"the commit in {place} belongs to a model that was built, not opened from a "
            "checkpoint: build it again (with torch.device('meta'): ...) and give it as model"
        )
    offloaded = [name for name, module in model.named_modules() if is_offloaded(module)]
    if offloaded:
        raise AlreadyOffloadedError(
            f"{len(offloaded)} modules of the model are offloaded already, {offloaded[0]!r} among "
            "them; give a plain model, best one built on the meta device"
        )
    _check_born(committed, place, model)
    for prefix, module in model.named_modules():
        caches = []
        for mapping in (module._parameters, module._buffers):
            cache = DiskCache(name=prefix, **options)
            cache.born.update(_layouts(mapping))
            caches.append(cache)
        attach_caches(module, *caches)
    return model


def _layouts(mapping: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: (one.dtype, tuple(one.shape)) for key, one in mapping.items() if one is not None}


def _check_born(committed: Committed, place: Path, model: torch.nn.Module) -> None:
    """Refuse a model that is not built as the committed one was."""
    born = committed.born or {}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for prefix, module in model.named_modules():
        for mapping in (module._parameters, module._buffers):
            for key, (dtype, shape) in _layouts(mapping).items():
                name = f"{prefix}.{key}" if prefix else key
                found[name] = (str(dtype).removeprefix("torch."), shape)
    faults = []
    missing = [name for name, (dtype, _) in born.items() if dtype and name not in found]
    unexpected = [name for name in found if name not in born]
    if missing:
        faults.append(f"the model lacks {listed(missing)}")
    if unexpected:
        faults.append(f"the commit lacks {listed(unexpected)}")
    differing = [
        f"{name} ({born[name][0]} {list(born[name][1])} committed, "
        f"{layout[0]} {list(layout[1])} in the model)"
        for name, layout in found.items()
        if name in born and born[name][0] and born[name] != layout
    ]
    if differing:
        faults.append(f"others differ: {listed(differing)}")
    if faults:
        raise CommitError(
            f"the commit in {place} is not of this model: {'; '.join(faults)}. Build the "
            "model as it was when it was offloaded"
        )
