"""Bind a model to a checkpoint where it lies: nothing is copied, nothing of the user's written."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import Device
from diskoffload.cache.disk import DiskCache
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.cache.ram import RamBacking
from diskoffload.checkpoint.converted import Converted, convert_all
from diskoffload.checkpoint.slots import Slots
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.dispatch import dispatch_model
from diskoffload.errors import (
    AlreadyOffloadedError,
    CheckpointMismatchError,
    InvalidInputError,
    listed,
)
from diskoffload.integrations.transformers import build_meta_model, require_pretrained
from diskoffload.integrations.transformers_conversion import (
    RecipeSet,
    ShapeMismatch,
    tensor_recipes,
)
from diskoffload.integrations.transformers_tensors import compute_tensors, untie
from diskoffload.module import attach_caches, is_offloaded
from diskoffload.planning import format_bytes, parse_bytes
from diskoffload.residency.held import Held, State
from diskoffload.residency.objects import object_like
from diskoffload.residency.resident import Residency, residency_for
from diskoffload.residency.streaming import Mode
from diskoffload.store.compression import Compression
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders
from diskoffload.store.recipe import Recipe
from diskoffload.store.stored import AssembledTensor, CastTensor, Stored
from diskoffload.system.collector import collector_paused
from diskoffload.system.devices import usable_device

_log = logging.getLogger(__name__)
_BINDING = "_offload_binding"


@dataclass(frozen=True)
class Binding:
    """What an opened model remembers of its checkpoint.

    Attributes:
        checkpoint: the source.
        recipes: by a model tensor's name, how it is made of stored ones.
        shapes: by the same name, the shape that is made.
        converted: what was computed at opening, because it has no recipe.
        dtype: the one that was asked for, if one was.
    """

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    shapes: Mapping[str, tuple[int, ...]]
    converted: Sequence[Converted]
    dtype: torch.dtype | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self  # it never changes, and its files are open once


def binding_of(model: torch.nn.Module) -> Binding | None:
    """Give what a model opened from a checkpoint remembers of it."""
    found = model.__dict__.get(_BINDING)
    return found if isinstance(found, Binding) else None


def open_checkpoint(
    path: Path | str,
    *,
    model: torch.nn.Module | None = None,
    offload_dir: Folder | Path | str | None = None,
    onload_device: Device = "cpu",
    dtype: torch.dtype | None = None,
    max_memory: Mapping[Any, int | float | str] | int | str | None = None,
    compression: Compression = None,
    align: bool = False,
    mode: Mode = "auto",
) -> torch.nn.Module:
    """Open a Hugging Face checkpoint where it lies, as a model whose weights stay on disk.

    Only headers are read. Each weight is mapped when it is first used; on the CPU it
    aliases the file's private mapping, so it costs no memory that the kernel cannot take
    back, and an edit of it never reaches the file. What changes goes to ``offload_dir``.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or
            one safetensors file. It is never written to, and may be read-only.
        model: a model built on the meta device, bound by its tensors' names; changed in
            place. Without it the transformers class is built that ``config.json`` names
            (extra ``transformers``).
        offload_dir: folder for what changes; ``None`` takes a fresh temporary one that
            goes with its owner.
        onload_device: where modules run.
        dtype: floating dtype of the model's weights; others are converted at each onload,
            the source stays as it is. ``None`` keeps the checkpoint's, or ``model``'s.
        max_memory: bytes for copies in RAM (weights that must be converted or decoded and
            are kept), as a number, a text, or ``{"cpu": "8GiB"}``; by default what is
            available. If it names accelerators, ``{0: "20GiB", "cpu": "8GiB"}``, the model
            is dispatched over them.
        compression: as for :class:`DiskCache`, for what is written to ``offload_dir``.
        align: copy weights that the file does not align to 64 bytes when they are used,
            rather than map them. Values are the same either way; the last bits of sums may
            differ, because kernels take another path for unaligned memory.
        mode: how weights are held on the CPU that lie in their files as they are used.
            ``"mapped"``: in the kernel's page cache, at no memory of the process's own;
            ``"streamed"``: read past that cache into buffers, as much as ``max_memory`` allows
            (half of what is available, if it says nothing) is kept, and given back when others
            need it, what is needed next is read ahead; ``"auto"``: streamed if ``max_memory``
            is given and they do not fit what is available, else mapped. The log says what was
            chosen, and why.

    Returns:
        The model, in eval mode if it was built here. It owns the folder and the mappings.

    Raises:
        CheckpointError: no such checkpoint, or an incomplete one.
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; one
            message names them all.
        DamagedFileError: a file breaks its format.
        AlreadyOffloadedError: ``model`` is offloaded.
        MissingExtraError: transformers is needed and absent. Nothing was written.
        UnsupportedTensorError: transformers' code cannot convert the checkpoint's tensors.
        NoSpaceError: what it must compute does not fit the folder's disk.
    """
    with collector_paused(all_stays=True):
        checkpoint = Checkpoint(path)
        if model is None:
            model = build_meta_model(checkpoint.folder, dtype=dtype)
            found, slots = _transformers_recipes(model, checkpoint)
        else:
            _check_plain(model)
            if dtype is not None:
                model.to(dtype)  # on the meta device this moves nothing
            found, slots = _recipes(model, checkpoint)
        _refuse_misfits(checkpoint, found)
    budgets = {"cpu": max_memory} if isinstance(max_memory, (int, str)) else dict(max_memory or {})
    ram = budgets.get("cpu")
    residency = residency_for(None if ram is None else parse_bytes(ram), mode)
    folder = _folder_beside(checkpoint, offload_dir)
    options = _CacheOptions(
        usable_device(onload_device), folder, compression, residency, align, dtype
    )
    converted = convert_all(model, checkpoint, found.conversions, folder, compression)
    with collector_paused(all_stays=True):
        _bind(model, slots, checkpoint, found, converted, options)
    _log.info(
        "opened %s: %d tensors, %s in %d shards, mapped where they lie; copies in RAM: %s; "
        "changes go to %s",
        checkpoint.path,
        len(checkpoint.tensors),
        format_bytes(checkpoint.size_bytes),
        len(checkpoint.shards),
        "what is available" if ram is None else format_bytes(parse_bytes(ram)),
        folder.path,
    )
    if set(budgets) - {"cpu", "disk"}:
        dispatch_model(model, max_memory=budgets, offload_dir=folder, compression=compression)
    return model


def _folder_beside(checkpoint: Checkpoint, offload_dir: Folder | Path | str | None) -> Folder:
    if isinstance(offload_dir, (str, Path)):
        place = Path(offload_dir).expanduser().resolve()
        if place == checkpoint.folder.resolve():
            raise InvalidInputError(
                f"offload_dir is the checkpoint's own folder {place}, to which nothing is ever "
                "written; name another one"
            )
    return open_folders.at(offload_dir)


@dataclass(frozen=True)
class _CacheOptions:
    """How the caches of an opened model are made."""

    onload_device: Device
    folder: Folder
    compression: Compression
    residency: Residency
    align: bool
    dtype: torch.dtype | None

    def cache(self, name: str) -> DiskCache:
        """Make an empty cache for the module of that name."""
        return DiskCache(
            self.onload_device,
            offload_dir=self.folder,
            compression=self.compression,
            name=name,
            residency=self.residency,
        )


# ---------------------------------------------------------------------- what fills what


def _check_plain(model: torch.nn.Module) -> None:
    offloaded: list[str] = []
    real: list[str] = []
    for prefix, module in model.named_modules():
        if is_offloaded(module):
            offloaded.append(prefix)
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                real.append(f"{prefix}.{key}" if prefix else key)
    if offloaded:
        raise AlreadyOffloadedError(
            f"{len(offloaded)} modules of the model are offloaded already, {offloaded[0]!r} among "
            "them; give a model built on the meta device (with torch.device('meta'): ...)"
        )
    if real:
        raise InvalidInputError(
            f"{len(real)} parameters of the model have values already, {real[0]!r} among them; "
            "give a model built on the meta device (with torch.device('meta'): ...)"
        )


def _transformers_recipes(
    model: torch.nn.Module, checkpoint: Checkpoint
) -> tuple[RecipeSet, Slots]:
    """Tell what fills the model's tensors, and list them as they are once ties are decided."""
    found = tensor_recipes(model, checkpoint.tensors)
    for name, duplicate in found.duplicates.items():
        first = _stored(found.recipes[found.ties[name]], checkpoint, None, ())
        second = _stored(duplicate, checkpoint, None, ())
        if not _same_value(first, second):
            untie(model, name)
            found.recipes[name] = duplicate
    if found.to_compute:
        compute_tensors(model, found.to_compute)
    return found, Slots(model)


def _same_value(first: Stored, second: Stored) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    tensors = [stored.mapped() for stored in (first, second)]
    loaded = [s.load() if t is None else t for s, t in zip((first, second), tensors, strict=True)]
    return torch.equal(*loaded)


def _recipes(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[RecipeSet, Slots]:
    # Asking transformers takes seconds, and who has not imported it has no model of its.
    if "transformers" in sys.modules:
        try:
            require_pretrained(model)
        except (InvalidInputError, ImportError):
            return _recipes_by_name(model, checkpoint)
        return _transformers_recipes(model, checkpoint)
    return _recipes_by_name(model, checkpoint)


def _recipes_by_name(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[RecipeSet, Slots]:
    """Match equal names; of a tie, any name will do."""
    found = RecipeSet()
    slots = Slots(model)
    tensors, stored = slots.tensors, checkpoint.tensors
    filled: set[int] = set()
    for name, tensor in tensors.items():
        if name not in stored or id(tensor) in filled:
            continue
        filled.add(id(tensor))
        shape = stored[name].shape
        if shape != tensor.shape:
            found.mismatched.append(ShapeMismatch(name, tuple(tensor.shape), tuple(shape)))
        found.recipes[name] = Recipe.whole(name)
    for name, tensor in tensors.items():
        if id(tensor) not in filled and tensor.is_meta:
            filled.add(id(tensor))  # of a tie only the first is named
            found.missing.append(name)
    for name, tensor in slots.unsaved_buffers():
        if tensor.is_meta:
            found.missing.append(f"{name} (a buffer that no checkpoint has: build it on the CPU)")
    found.unexpected = [name for name in stored if name not in tensors]
    return found, slots


def _refuse_misfits(checkpoint: Checkpoint, found: RecipeSet) -> None:
    faults = []
    if found.missing:
        faults.append(f"{len(found.missing)} missing: {listed(found.missing)}")
    if found.mismatched:
        shapes = [
            f"{one.name} ({list(one.stored_shape)} in the checkpoint, {list(one.model_shape)} "
            "in the model)"
            for one in found.mismatched
        ]
        faults.append(f"{len(shapes)} of another shape: {listed(shapes)}")
    if found.unexpected:
        faults.append(f"{len(found.unexpected)} unexpected: {listed(found.unexpected)}")
    if faults:
        raise CheckpointMismatchError(
            f"{checkpoint.path} and the model do not fit; tensors " + "; ".join(faults) + "; "
            "open it with the model it was saved from"
        )


# ---------------------------------------------------------------------- binding


def _stored(
    recipe: Recipe, checkpoint: Checkpoint, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> Stored:
    if recipe.is_whole:
        whole = checkpoint.tensors[recipe.pieces[0].source]
        return whole if dtype in (None, whole.dtype) else CastTensor(whole, dtype)
    pieces = [(piece, checkpoint.tensors[piece.source]) for piece in recipe.pieces]
    return AssembledTensor(pieces, dtype or pieces[0][1].dtype, shape)


def _bind(
    model: torch.nn.Module,
    slots: Slots,
    checkpoint: Checkpoint,
    found: RecipeSet,
    converted: Sequence[Converted],
    options: _CacheOptions,
) -> None:
    names: dict[int, str] = {}
    tensors = slots.tensors
    computed = {name: stored for group in converted for name, stored in group.tensors.items()}
    for name in [*found.recipes, *computed]:
        names.setdefault(id(tensors[name]), name)
    made: dict[int, Held] = {}

    def entry(full_name: str, tensor: torch.Tensor) -> Held:
        name = names.get(id(tensor))
        if name is None:
            # A table that no checkpoint has: small, real, and nobody's file.
            held = Held(full_name, RamBacking(tensor), tensor=tensor, state=State.VACANT)
            held.lay(tensor, State.BENEATH)
            return held
        shape = tuple(tensor.shape)
        stored = computed.get(name) or _stored(found.recipes[name], checkpoint, tensor.dtype, shape)
        backing = DiskBacking(options.folder, options.compression, stored, align=options.align)
        template = tensor if tensor.is_meta else object_like(tensor, tensor.to("meta"))
        return Held(name, backing, template=template)

    empty = options.cache("")
    for prefix, module in slots.modules:
        caches = []
        for mapping in (module._parameters, module._buffers):
            entries: dict[str, Held | None] = dict.fromkeys(mapping)
            for key, tensor in mapping.items():
                if tensor is not None:
                    held = made.get(id(tensor))
                    if held is None:
                        held = made[id(tensor)] = entry(
                            f"{prefix}.{key}" if prefix else key, tensor
                        )
                    entries[key] = held
            caches.append(empty.like(prefix))
            caches[-1].bind_all_lazily(entries)
        attach_caches(module, *caches)
    shapes = {name: tensors[name].shape for name in found.recipes}
    model.__dict__[_BINDING] = Binding(checkpoint, found.recipes, shapes, converted, options.dtype)
