"""A Hugging Face checkpoint as it lies on disk: its files, its tensors, its config."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from diskoffload.errors import CheckpointError, listed
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.json_reader import JsonReader, brief, short_int
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import Files, naming_faults

SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = f"model{INDEX_SUFFIX}"
CONFIG_NAME = "config.json"
# More than any real index or config has. They bound what a hostile one takes: json.loads makes
# up to 40 bytes of one of its text, and up to 300 of one value.
_MAX_INDEX_BYTES = 128 << 20
_MAX_INDEXED_TENSORS = 2_000_000
_MAX_INDEX_KEYS = 1000
_MAX_INDEX_OTHER_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 16 << 20
_MAX_CONFIG_VALUES = 1_000_000
_MAX_FILE_NAME_BYTES = 255  # of every file system we know
_MAX_SHOWN = 160


class Checkpoint:
    """A checkpoint opened where it lies: headers are read, no tensor is.

    Nothing in the folder is ever written, and hub caches' symlinks are followed.

    Attributes:
        folder: the folder; of a single file, the one it is in.
        tensors: what is stored, by name.
        config: what ``config.json`` says; empty where there is none.
        index: the file that says which shard holds which tensor, if there is one.
    """

    def __init__(self, path: Path | str, files: Files | None = None) -> None:
        """Open a folder, or a single safetensors file.

        Raises:
            CheckpointError: there is no checkpoint, a shard is missing, or the index names
                what no shard has; all faults in one message.
            DamagedFileError: a shard is not a valid safetensors file.
            StorageError: a file cannot be read.
        """
        path = Path(path).expanduser().absolute()
        files = files or Files()
        if _kind(path) == "missing":
            raise CheckpointError(f"{path} does not exist: give a checkpoint's folder or file")
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.config = _read_config(self.folder / CONFIG_NAME, files)
        self.index: Path | None = None
        single = _single_file(path)
        if single is not None:
            _check_shards(path, self.folder, [single.name])
            self.shards = {single.name: Shard(single, files)}
            self.tensors: dict[str, ShardTensor | EncodedTensor]
            self.tensors = stored_tensors(self.shards[single.name])
            return
        self.index = _index_of(path)
        weight_map = _weight_map(self.index, files)
        names = dict.fromkeys(weight_map.values())
        _check_shards(path, self.folder, names)
        self.shards = {name: Shard(self.folder / name, files) for name in names}
        held = {name: stored_tensors(shard) for name, shard in self.shards.items()}
        absent = [
            f"{_shown(name)} ({_shown(file)})"
            for name, file in weight_map.items()
            if name not in held[file]
        ]
        if absent:
            raise CheckpointError(
                f"{path}: its index names tensors that their shards do not have: "
                f"{listed(absent)}; index and shards are not of one checkpoint"
            )
        self.tensors = {name: held[file][name] for name, file in weight_map.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())


def _kind(path: Path | str) -> str:
    """Tell what a path leads to: a ``"file"``, a ``"folder"``, ``"missing"``, or what else."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return "missing"
    except OSError as error:
        with naming_faults("look at", path):
            raise error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"


def _check_shards(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Refuse what is no file before it is opened: opening a named pipe waits for its writer."""
    kinds = {name: _kind(f"{folder}{os.sep}{name}") for name in names}
    missing = sorted(name for name, kind in kinds.items() if kind == "missing")
    if missing:
        raise CheckpointError(
            f"{path} is incomplete: of its shards {listed([_shown(n) for n in missing])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; fetch the checkpoint again"
        )
    odd = [f"{_shown(name)} is {kind}" for name, kind in kinds.items() if kind != "file"]
    if odd:
        raise CheckpointError(f"{path}: of its shards {listed(odd)}; fetch the checkpoint again")


def _shown(name: str) -> str:
    """Show a name from a file as it is, unless it is so long or odd that it would harm."""
    return name if name.isprintable() and len(name) <= _MAX_SHOWN else brief(name)


def _read_file(path: Path, most_bytes: int, files: Files) -> bytearray:
    kind = _kind(path)
    if kind != "file":
        _refuse_file(path, f"is {kind}")
    with files.reading(path) as fd:
        size_bytes = files.size_bytes(fd, path)
        if size_bytes > most_bytes:
            _refuse_file(path, f"has {size_bytes} bytes, more than the {most_bytes} we read")
        raw = bytearray(size_bytes)
        files.read_into(fd, memoryview(raw), 0, path)
    return raw


def _refuse_file(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"cannot use {path}: it {reason}; fetch it again")


def _read_config(path: Path, files: Files) -> dict[str, Any]:
    """Read a table from a JSON file that may be absent."""
    if _kind(path) == "missing":
        return {}
    raw = _read_file(path, _MAX_CONFIG_BYTES, files)
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > _MAX_CONFIG_VALUES:
        _refuse_file(path, f"holds more than {_MAX_CONFIG_VALUES} values")
    try:
        content = json.loads(raw.decode("utf-8"), parse_int=short_int)
    except RecursionError:
        _refuse_file(path, "is nested too deeply")
    except ValueError as error:
        _refuse_file(path, f"is not JSON ({error})")
    if not isinstance(content, dict):
        _refuse_file(path, "holds no table")
    # transformers judges the rest, by errors of its own.
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        _refuse_file(path, f"has the architectures {brief(classes)}")
    return content


def _single_file(path: Path) -> Path | None:
    """Find the one file that is the whole checkpoint, if it is one."""
    if path.is_file():
        return path
    if next(path.glob(f"*{INDEX_SUFFIX}"), None) is not None:
        return None
    if _kind(path / SINGLE_NAME) != "missing":
        return path / SINGLE_NAME
    singles = sorted(path.glob("*.safetensors"))
    return singles[0] if len(singles) == 1 else None


def _index_of(path: Path) -> Path:
    """Find the file that says which shard holds which tensor."""
    index = path / INDEX_NAME
    if _kind(index) == "missing":
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indices) != 1:
            _refuse(path, [*indices, *sorted(path.glob("*.safetensors"))])
        index = indices[0]
    return index


def _weight_map(index: Path, files: Files) -> dict[str, str]:
    """Read which shard holds which tensor."""
    weight_map: dict[str, str] = {}
    known: dict[str, str] = {}
    keys = tensors = 0

    def shard_of(tensor: str) -> str:
        nonlocal tensors
        tensors += 1
        if tensors > _MAX_INDEXED_TENSORS:
            _refuse_file(index, f"names more than {_MAX_INDEXED_TENSORS} tensors")
        file = reader.value(_MAX_INDEX_OTHER_BYTES)
        if not isinstance(file, str) or (file not in known and not _is_file_name(file)):
            raise CheckpointError(
                f"{index} puts tensor {brief(tensor)} in {brief(file)}, which is not the name of "
                "a file in its folder; do not trust this checkpoint"
            )
        return known.setdefault(file, file)

    def entry(key: str) -> None:
        nonlocal weight_map, keys
        keys += 1
        if keys > _MAX_INDEX_KEYS:
            _refuse_file(index, f"has more than {_MAX_INDEX_KEYS} keys")
        if key == "weight_map" and reader.at_table():
            weight_map = reader.table(shard_of)
        else:
            reader.value(_MAX_INDEX_OTHER_BYTES)

    raw = _read_file(index, _MAX_INDEX_BYTES, files)
    reader = JsonReader(raw, lambda reason: _refuse_file(index, reason))
    reader.table(entry)
    reader.finish()
    if not weight_map:
        raise CheckpointError(f"{index} has no table 'weight_map'; fetch it again")
    return weight_map


def _is_file_name(text: str) -> bool:
    """Tell whether this can be the name of a file in a folder, and nothing else."""
    try:
        nbytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False
    return 0 < nbytes <= _MAX_FILE_NAME_BYTES and text not in (".", "..") and not {*"/\0"} & {*text}


def _refuse(path: Path, candidates: list[Path]) -> NoReturn:
    if candidates:
        names = listed([_shown(p.name) for p in candidates])
        raise CheckpointError(
            f"{path} holds several sets of weights ({names}) and no {INDEX_NAME}; "
            "name the file that is meant"
        )
    foreign = (p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    others = sorted(map(_shown, foreign))
    hint = (
        f"it has {listed(others)}, which cannot be mapped safely; convert it to safetensors"
        if others
        else "a checkpoint has model.safetensors or model.safetensors.index.json"
    )
    raise CheckpointError(f"{path} is not a checkpoint: {hint}")
