"""What lies where: the shards and tensors of an offload folder, a checkpoint or one file.

Only headers are read, so it is quick whatever the size, and safe on a folder in use.
"""

from __future__ import annotations

import stat
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.errors import CheckpointError, OffloadError
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.json_reader import brief
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files, naming_faults

_MOST_SHOWN = 120


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file.

    Attributes:
        name: its key.
        dtype: of the value, as torch names it.
        shape: of the value.
        stored_bytes: what it takes in the file.
        value_bytes: what it takes in memory.
        offset: first byte in the file.
        compression: how it is packed, or ``None``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    value_bytes: int
    offset: int
    compression: str | None


@dataclass(frozen=True)
class ShardInfo:
    """One safetensors file.

    Attributes:
        path: the file.
        file_bytes: its length.
        header_bytes: where the tensors begin.
        filler_bytes: what only keeps tensors aligned.
        tensors: what it holds, in the order of their bytes.
        fault: why it cannot be read, if it cannot; the rest is then zero.
    """

    path: str
    file_bytes: int
    header_bytes: int = 0
    filler_bytes: int = 0
    tensors: list[TensorInfo] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class Inspection:
    """All the safetensors files of a place."""

    path: str
    shards: list[ShardInfo]

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor of every file."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def totals(self) -> dict[str, Any]:
        """Count files, tensors and bytes."""
        dtypes: Counter[str] = Counter()
        for tensor in self.tensors:
            dtypes[tensor.dtype] += tensor.stored_bytes
        return {
            "shards": len(self.shards),
            "tensors": len(self.tensors),
            "file_bytes": sum(shard.file_bytes for shard in self.shards),
            "stored_bytes": sum(tensor.stored_bytes for tensor in self.tensors),
            "value_bytes": sum(tensor.value_bytes for tensor in self.tensors),
            "header_bytes": sum(shard.header_bytes for shard in self.shards),
            "filler_bytes": sum(shard.filler_bytes for shard in self.shards),
            "stored_bytes_by_dtype": dict(dtypes.most_common()),
            "faults": sum(shard.fault is not None for shard in self.shards),
        }

    def as_json(self) -> dict[str, Any]:
        """Give all of it as what :func:`json.dumps` takes; sizes are in bytes."""
        return {
            "path": self.path,
            "totals": self.totals(),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def as_table(self, *, only_shards: bool = False) -> str:
        """Draw a table of shards and, unless ``only_shards``, of their tensors."""
        lines: list[str] = []
        for shard in self.shards:
            size = format_bytes(shard.file_bytes)
            state = shard.fault or _count(len(shard.tensors), "tensor")
            lines.append(f"{_shown(Path(shard.path).name)}  {size}  {_printable(state)}")
            if only_shards:
                continue
            lines.extend(f"  {line}" for line in _rows(shard.tensors))
        totals = self.totals()
        by_dtype = ", ".join(
            f"{dtype} {format_bytes(size)}"
            for dtype, size in totals["stored_bytes_by_dtype"].items()
        )
        lines.append(
            f"{_count(totals['shards'], 'shard')}, {_count(totals['tensors'], 'tensor')}, "
            f"{format_bytes(totals['file_bytes'])} on disk for "
            f"{format_bytes(totals['value_bytes'])} of values ({by_dtype or 'nothing'})"
        )
        return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _printable(text: str) -> str:
    """Escape what would steer a terminal, break a line or fail to print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shown(text: str) -> str:
    """Shorten what a file says: the widest cell is the width of all."""
    return _printable(text if len(text) <= _MOST_SHOWN else brief(text))


def _rows(tensors: list[TensorInfo]) -> list[str]:
    if not tensors:
        return []
    cells = [("name", "dtype", "shape", "size", "offset", "compression")]
    cells += [
        (
            _shown(tensor.name),
            tensor.dtype,
            _shown("x".join(map(str, tensor.shape)) or "scalar"),
            format_bytes(tensor.stored_bytes),
            str(tensor.offset),
            _packing(tensor),
        )
        for tensor in tensors
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = (3, 4)  # numbers line up at their last digit
    return [
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _packing(tensor: TensorInfo) -> str:
    if tensor.compression is None:
        return "-"
    share = tensor.stored_bytes / tensor.value_bytes if tensor.value_bytes else 1.0
    return f"{tensor.compression} {share:.3f}"


def inspect_path(path: Path | str) -> Inspection:
    """List what lies in an offload folder, a checkpoint's folder or one safetensors file.

    A file that cannot be read is listed with its fault; the others are shown all the same.

    Raises:
        CheckpointError: the path does not exist, or has no safetensors file.
        StorageError: the path cannot be looked at.
    """
    path = Path(path).expanduser()
    with naming_faults("look at", path):
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(path.glob("*.safetensors"))
        else:
            raise CheckpointError(f"{path} does not exist: give a folder or a safetensors file")
    if not found:
        raise CheckpointError(f"{path} has no *.safetensors file, so there is nothing to show")
    return Inspection(str(path), [_inspect(one) for one in found])


def _inspect(path: Path) -> ShardInfo:
    file_bytes = 0
    try:
        with naming_faults("look at", path):
            status = path.stat()
        file_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe waits for its writer
            return ShardInfo(str(path), file_bytes, fault=f"{path} is no file")
        shard = Shard(path, Files())
        stored = stored_tensors(shard)
    except OffloadError as error:
        return ShardInfo(str(path), file_bytes, fault=str(error))
    tensors = []
    filler = 0
    for name, tensor in stored.items():
        if name.startswith(FILLER_PREFIX):
            filler += tensor.spec.nbytes
            continue
        encoded = tensor if isinstance(tensor, EncodedTensor) else None
        value_bytes = tensor.spec.nbytes if encoded is None else encoded.nbytes
        tensors.append(
            TensorInfo(
                name,
                str(tensor.dtype).removeprefix("torch."),
                tensor.shape,
                tensor.spec.nbytes,
                value_bytes,
                tensor.spec.offset,
                None if encoded is None else encoded.compression,
            )
        )
    header = shard.header
    return ShardInfo(str(path), header.file_bytes, header.data_offset, filler, tensors)
