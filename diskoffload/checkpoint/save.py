"""Write a model as an ordinary checkpoint, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import OffloadCache
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.checkpoint.converted import Converted, Reverted, in_dtype
from diskoffload.checkpoint.layout import lay_out
from diskoffload.checkpoint.open import Binding, binding_of
from diskoffload.checkpoint.publish import check_space, copy_side_files, new_folder, write_text
from diskoffload.errors import InvalidInputError, UnsupportedTensorError
from diskoffload.planning import format_bytes, parse_bytes
from diskoffload.progress import byte_bar
from diskoffload.residency.held import Held, State
from diskoffload.residency.resident import current_value
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.header import DTYPE_NAMES, Planned
from diskoffload.store.read_ahead import ReadAhead
from diskoffload.store.recipe import Piece, Recipe
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import AssembledTensor, ShardTensor, Stored
from diskoffload.system.files import Files
from diskoffload.system.memory import empty, tensor_bytes

_log = logging.getLogger(__name__)


def save_checkpoint(
    model: torch.nn.Module,
    out: Path | str,
    max_shard_size: int | str = "5GB",
    *,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """Write a model as an ordinary checkpoint that transformers and vLLM load.

    One tensor is in memory at a time. What did not change since it was read from a file is
    copied from file to file; in-place edits and new values are written from memory. Tied
    tensors are written once. Config, generation config and the source's tokenizer files
    are written beside. The folder appears at ``out`` when all of it is on the disk.

    Args:
        model: offloaded or plain; not changed.
        out: a folder. It must not exist, or be empty, unless ``overwrite`` is true.
        max_shard_size: largest file, in bytes or as ``"5GB"``; one tensor that is larger
            has a file of its own.
        overwrite: replace a checkpoint at ``out``, even the one the model was opened from:
            a sibling is built and the folders exchanged, so a kill at any moment leaves one
            whole checkpoint. Files that are not weights are carried over.
        show_progress: show a progress bar in bytes.

    Returns:
        The folder.

    Raises:
        OutputExistsError: ``out`` is taken.
        NoSpaceError: the disk has too little room; found before anything is written.
        UnsupportedTensorError: a tensor that safetensors cannot store.
        StorageError: writing failed; ``out`` is as it was.
    """
    path = Path(out).expanduser().resolve()  # through a link: its target is replaced, not it
    max_shard_bytes = parse_bytes(max_shard_size)
    if max_shard_bytes < 1:
        raise InvalidInputError(f"max_shard_size is {max_shard_size!r}; give at least one byte")
    items = _items(model)
    layout = lay_out([item.planned for item in items.values()], max_shard_bytes)
    files, ahead = Files(), ReadAhead()
    with new_folder(path, files, overwrite=overwrite) as folder:
        check_space(path, layout.size_bytes)
        with byte_bar(layout.size_bytes, "Saving", show=show_progress) as bar:
            for file, planned in layout.files.items():
                with ShardWriter(folder / file, planned, files, {"format": "pt"}) as writer:
                    specs = writer.header.specs
                    for item in ahead.through(
                        map(items.__getitem__, specs), lambda item: item.reads
                    ):
                        item.write(writer)
                        bar.update(specs[item.name].nbytes)
                    writer.publish()
        index = layout.index_json()
        if index is not None:
            write_text(folder / layout.index_name, index, files)
        _write_configs(model, folder)
        binding = binding_of(model)
        if binding is not None:
            copy_side_files(binding.checkpoint.folder, folder)
    _log.info(
        "saved %d tensors, %s in %d files, to %s",
        len(items),
        format_bytes(layout.size_bytes),
        len(layout.files),
        path,
    )
    return path


def _write_configs(model: torch.nn.Module, folder: Path) -> None:
    for attribute in ("config", "generation_config"):
        config: Any = getattr(model, attribute, None)
        if not hasattr(config, "save_pretrained"):
            continue
        if attribute == "config" and not getattr(config, "architectures", None):
            config.architectures = [type(model).__name__]
        if attribute == "config" and isinstance(getattr(model, "dtype", None), torch.dtype):
            config.dtype = model.dtype
        config.save_pretrained(folder)


# ---------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class _Item:
    """One tensor of the result: what it will be called, how to write it, what is read for that."""

    planned: Planned
    write_to: Callable[[ShardWriter, str], None]
    reads: tuple[ShardTensor, ...] = ()

    @property
    def name(self) -> str:
        return self.planned[0]

    def write(self, writer: ShardWriter) -> None:
        self.write_to(writer, self.name)


def _items(model: torch.nn.Module) -> dict[str, _Item]:
    values = _values(model)
    binding = binding_of(model)
    items: dict[str, _Item] = {}
    done: set[str] = set()
    if binding is not None:
        fitting = {
            name: recipe
            for name, recipe in binding.recipes.items()
            # A tensor that was replaced by one of another shape is saved as it is.
            if name in values and _layout_of(values[name])[1] == binding.shapes[name]
        }
        for item in _inverted(fitting, values, binding):
            items[item.planned[0]] = item
        done = set(fitting)
        for group in binding.converted:
            if group.tensors.keys() <= values.keys():
                for item in _converted_items(model, group, values, binding):
                    items[item.planned[0]] = item
                    done |= group.tensors.keys()
    for name, value in values.items():
        if name not in done:
            items[name] = _plain_item(name, value)
    unsupported = [name for name, item in items.items() if item.planned[1] not in DTYPE_NAMES]
    if unsupported:
        raise UnsupportedTensorError(
            f"cannot save {len(unsupported)} tensors, {unsupported[0]!r} among them: safetensors "
            f"has no dtype for {items[unsupported[0]].planned[1]}; convert them first"
        )
    return items


_Value = Held | torch.Tensor | Stored


def _values(model: torch.nn.Module) -> dict[str, _Value]:
    """List what a state dict would hold, ties under one name, without reading a tensor."""
    found: dict[Hashable, tuple[str, _Value]] = {}
    dropped = _names_not_saved(model)
    for prefix, module in model.named_modules():
        persistent = module._non_persistent_buffers_set
        for mapping in (module._parameters, module._buffers):
            entries: Any = mapping
            pairs = entries.held_items() if isinstance(entries, OffloadCache) else entries.items()
            for key, value in pairs:
                if value is None or (mapping is module._buffers and key in persistent):
                    continue
                name = f"{prefix}.{key}" if prefix else key
                known = found.get(_identity(value))
                preferred = name not in dropped and (
                    known is None or known[0] in dropped or getattr(value, "name", None) == name
                )
                if known is None or preferred:
                    found[_identity(value)] = (name, value)
    return dict(found.values())


def _identity(value: _Value) -> Hashable:
    if isinstance(value, Held):
        if isinstance(value.backing, ViewBacking) and not value.is_changed():
            return id(value.root), value.backing.extent  # two views of the same bytes are one
        if value.tensor is not None:
            # A tie between a plain and an offloaded module is one object behind two faces.
            return id(value.tensor)
    return id(value)


def _names_not_saved(model: torch.nn.Module) -> set[str]:
    """Find tied names that transformers expects to be absent from a checkpoint."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return set(tied) if isinstance(tied, dict) else set()


def _layout_of(value: _Value) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(value, Held):
        if value.tensor is None or value.state is State.VACANT:
            assert value.backing is not None  # a lazy or vacant entry has its value there
            return value.backing.layout
        return value.tensor.dtype, tuple(value.tensor.shape)
    return value.dtype, tuple(value.shape)


def _plain_item(name: str, value: _Value) -> _Item:
    dtype, shape = _layout_of(value)

    def write(writer: ShardWriter, key: str) -> None:
        source = _source(value)
        if isinstance(source, ShardTensor):  # the file's bytes are the value's
            source.shard.copy_to(source.spec, writer, key, source.digest)
        else:
            writer.write(key, tensor_bytes(_real(source)))

    return _Item((name, dtype, shape), write, _reads(value))


def _reads(value: _Value) -> tuple[ShardTensor, ...]:
    """Tell what is most likely read for a value: an edit, which costs a look, is not looked for."""
    if not isinstance(value, Held):
        return (value,) if isinstance(value, ShardTensor) else ()
    stored = value.backing.plain_stored if value.backing is not None else None
    return (stored,) if stored is not None and value.state is State.VACANT else ()


def _source(value: _Value) -> Stored | torch.Tensor:
    """Find where a value is now: unchanged on disk, or in memory."""
    if not isinstance(value, Held):
        return value
    backing, tensor = current_value(value)
    if isinstance(backing, DiskBacking) and backing.stored is not None:
        return backing.stored
    if tensor is None and backing is not None:
        tensor = backing.memory if backing.root is None else backing.load(torch.device("cpu"))
    assert tensor is not None  # what is not on disk is in memory
    return tensor


def _real(source: Stored | torch.Tensor) -> torch.Tensor:
    """Give a value as a contiguous CPU tensor; a copy only if it must be."""
    tensor = source if isinstance(source, torch.Tensor) else source.load()
    if tensor.is_meta:
        raise UnsupportedTensorError(
            "cannot save a tensor on the meta device: it has no value; load or assign it first"
        )
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


# ---------------------------------------------------------------------- fused tensors


def _inverted(
    recipes: dict[str, Recipe], values: dict[str, _Value], binding: Binding
) -> list[_Item]:
    """Give the stored tensors again that the model's were made of."""
    parts: dict[str, list[tuple[str, Piece]]] = {}
    for name, recipe in recipes.items():
        for piece in recipe.pieces:
            parts.setdefault(piece.source, []).append((name, piece))
    items = []
    for source_name, pieces in parts.items():
        if len(pieces) == 1 and pieces[0][1].is_whole:
            item = _plain_item(source_name, values[pieces[0][0]])
        else:
            item = _pieces_item(source_name, pieces, values, binding)
        items.append(item)
    return items


def _pieces_item(
    source_name: str, pieces: list[tuple[str, Piece]], values: dict[str, _Value], binding: Binding
) -> _Item:
    original = binding.checkpoint.tensors[source_name]
    dtypes = {_layout_of(values[name])[0] for name, _ in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else original.dtype
    shape = tuple(original.shape)

    def write(writer: ShardWriter, key: str) -> None:
        as_stored = all(_is_as_stored(values[name]) for name, _ in pieces)
        if as_stored and isinstance(original, ShardTensor) and dtype == original.dtype:
            original.shard.copy_to(original.spec, writer, key, original.digest)
            return
        tensor = empty(dtype, shape)
        regions = [tensor[piece.region] if piece.region else tensor for _, piece in pieces]
        if sum(region.numel() for region in regions) < tensor.numel():
            tensor.copy_(original.load())  # rows of padding, say, which the model leaves out
        for (name, piece), region in zip(pieces, regions, strict=True):
            value = _real(_source(values[name]))
            part = value[piece.target] if piece.target else value
            if piece.permutation is not None:
                part = part.permute(_inverse(piece.permutation))
            region.copy_(part)
        writer.write(key, tensor_bytes(tensor))

    return _Item((source_name, dtype, shape), write)


def _converted_items(
    model: torch.nn.Module, group: Converted, values: dict[str, _Value], binding: Binding
) -> list[_Item]:
    """Give the stored tensors again that transformers' code made a group of; none if it cannot."""
    layouts = {name: _layout_of(values[name]) for name in group.tensors}
    if all(_source(values[name]) is stored for name, stored in group.tensors.items()):
        dtype = next(iter(layouts.values()))[0]
        stored = {name: binding.checkpoint.tensors[name] for name in group.sources}
        return [_plain_item(name, in_dtype(one, dtype)) for name, one in stored.items()]
    reverted = Reverted(model, layouts, lambda name: _real(_source(values[name])))

    def write(writer: ShardWriter, key: str) -> None:
        writer.write(key, tensor_bytes(_real(reverted.take(key))))

    planned = reverted.planned or {}
    return [_Item((name, *layout), write) for name, layout in planned.items()]


def _is_as_stored(value: _Value) -> bool:
    # Only a checkpoint's own pieces are assembled; what we have written ourselves is whole.
    return isinstance(_source(value), AssembledTensor)


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(permutation.index(dim) for dim in range(len(permutation)))
