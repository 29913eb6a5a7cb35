"""A Hugging Face checkpoint as it lies on disk: its files, its tensors, its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from diskoffload.errors import CheckpointError, OffloadError, listed
from diskoffload.store.shard import Shard
from diskoffload.store.stored import EncodedTensor, ShardTensor, stored_tensors
from diskoffload.system.files import Files

SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = f"model{INDEX_SUFFIX}"
CONFIG_NAME = "config.json"
# More than any real index or config; a hostile one is refused before it is parsed.
_MAX_JSON_BYTES = 256 << 20


class Checkpoint:
    """A checkpoint opened where it lies: headers are read, no tensor is.

    Nothing in the folder is ever written, and hub caches' symlinks are followed.

    Attributes:
        folder: the folder; of a single file, the one it is in.
        tensors: what is stored, by name.
        config: what ``config.json`` says; empty where there is none.
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
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give a checkpoint's folder or file")
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.config = read_json(self.folder / CONFIG_NAME, required=False)
        single = _single_file(path)
        if single is not None:
            self.shards = {single.name: Shard(single, files)}
            self.tensors: dict[str, ShardTensor | EncodedTensor]
            self.tensors = stored_tensors(self.shards[single.name])
            return
        weight_map = _weight_map(path)
        missing = sorted(
            {name for name in weight_map.values() if not (self.folder / name).exists()}
        )
        if missing:
            raise CheckpointError(
                f"{path} is incomplete: of its shards {listed(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; fetch the checkpoint again"
            )
        names = dict.fromkeys(weight_map.values())
        self.shards = {name: Shard(self.folder / name, files) for name in names}
        held = {name: stored_tensors(shard) for name, shard in self.shards.items()}
        absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in held[file]]
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


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a table from a JSON file; one that is not required may be absent.

    Raises:
        CheckpointError: it cannot be read, or is no table.
    """
    try:
        if not required and not path.exists():
            return {}
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OffloadError):
            raise
        raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error
    return content


def _single_file(path: Path) -> Path | None:
    """Find the one file that is the whole checkpoint, if it is one."""
    if path.is_file():
        return path
    if next(path.glob(f"*{INDEX_SUFFIX}"), None) is not None:
        return None
    if (path / SINGLE_NAME).exists():
        return path / SINGLE_NAME
    singles = sorted(path.glob("*.safetensors"))
    return singles[0] if len(singles) == 1 else None


def _weight_map(path: Path) -> dict[str, str]:
    """Read which shard holds which tensor."""
    index = path / INDEX_NAME
    if not index.exists():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indices) != 1:
            _refuse(path, [*indices, *sorted(path.glob("*.safetensors"))])
        index = indices[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no table 'weight_map'; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index} puts tensor {name!r} in {str(file)[:80]!r}, which is not the name of a "
                "file in its folder; do not trust this checkpoint"
            )
    return dict(weight_map)


def _refuse(path: Path, candidates: list[Path]) -> NoReturn:
    if candidates:
        raise CheckpointError(
            f"{path} holds several sets of weights ({listed([p.name for p in candidates])}) and "
            f"no {INDEX_NAME}; name the file that is meant"
        )
    others = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = (
        f"it has {listed(others)}, which cannot be mapped safely; convert it to safetensors"
        if others
        else "a checkpoint has model.safetensors or model.safetensors.index.json"
    )
    raise CheckpointError(f"{path} is not a checkpoint: {hint}")
