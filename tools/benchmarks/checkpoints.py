"""Makes the checkpoints that all arms read: plain safetensors files, as from any writer.

Tensors start at multiples of 64 bytes (the header is padded with spaces), so that every
library works on equally aligned memory and outputs can be compared bit by bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ALIGNMENT_BYTES = 64
_POOL_ELEMENTS = 16 << 20
_SEED = 20240817
_STAMP = "benchmark.json"
_INDEX = "model.safetensors.index.json"
_ITEM_BYTES = 4


@dataclass(frozen=True)
class Spec:
    """A stack of square ``Linear`` layers in float32.

    Attributes:
        layers: how many.
        side: rows and columns of each.
        bias: whether each has one.
        shard_bytes: the largest file.
        is_sparse: the files are holes, which read as zeros: nothing is on the disk.
    """

    layers: int
    side: int
    bias: bool = False
    shard_bytes: int = 256 << 20
    is_sparse: bool = False

    @property
    def tensors(self) -> int:
        """How many tensors it has."""
        return self.layers * (2 if self.bias else 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.layers * _ITEM_BYTES * self.side * (self.side + self.bias)

    @property
    def folder_name(self) -> str:
        """A name for its folder."""
        kind = "-".join(["bias"] * self.bias + ["sparse"] * self.is_sparse + ["checkpoint"])
        return f"{kind}-{self.layers}x{self.side}-{self.shard_bytes >> 20}"

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Give names and shapes in the order of the model."""
        for layer in range(self.layers):
            yield f"{layer}.weight", (self.side, self.side)
            if self.bias:
                yield f"{layer}.bias", (self.side,)


@dataclass(frozen=True)
class Checkpoint:
    """One that lies on the disk."""

    folder: Path
    spec: Spec

    @property
    def files(self) -> list[Path]:
        """Its safetensors files."""
        return sorted(self.folder.glob("*.safetensors"))

    def file_of(self) -> dict[str, Path]:
        """Tell the file of each tensor."""
        index = self.folder / _INDEX
        if not index.exists():
            return dict.fromkeys((name for name, _ in self.spec.shapes()), self.files[0])
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {tensor: self.folder / file for tensor, file in names.items()}


def build(spec: Spec) -> torch.nn.Sequential:
    """Build the model of a checkpoint on the meta device."""
    return torch.nn.Sequential(
        *(
            torch.nn.Linear(spec.side, spec.side, bias=spec.bias, device="meta")
            for _ in range(spec.layers)
        )
    )


def made(work_dir: Path, spec: Spec) -> Checkpoint:
    """Write a checkpoint below ``work_dir``, unless it is there."""
    folder = work_dir / spec.folder_name
    if not (folder / _STAMP).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, spec)
        (folder / _STAMP).write_text(json.dumps(asdict(spec)))
    return Checkpoint(folder, spec)


def there(folder: str | Path) -> Checkpoint:
    """Find a checkpoint that :func:`made` wrote."""
    stamp: dict[str, Any] = json.loads(Path(folder, _STAMP).read_text())
    return Checkpoint(Path(folder), Spec(**stamp))


def random_values(spec: Spec) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Give values for each tensor, in order; a chain of the layers keeps its input's size.

    They are cut from one pool, each piece scaled by something else.
    """
    generator = np.random.default_rng(_SEED)
    count = min(_POOL_ELEMENTS, 2 * spec.side * spec.side + (1 << 16))
    pool = generator.standard_normal(count, dtype=np.float32) / np.float32(spec.side**0.5)
    for _, shape in spec.shapes():
        elements = int(np.prod(shape))
        start = int(generator.integers(count - elements + 1))
        scale = np.float32(generator.uniform(0.9, 1.1))
        yield (pool[start : start + elements] * scale).reshape(shape)


def _write(folder: Path, spec: Spec) -> None:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled_bytes = 0
    for name, shape in spec.shapes():
        nbytes = _ITEM_BYTES * int(np.prod(shape))
        if shards[-1] and filled_bytes + nbytes > spec.shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append((name, shape))
        filled_bytes += nbytes
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = ["model.safetensors"]
    values = random_values(spec)
    for name, shapes in zip(names, shards, strict=True):
        _write_file(folder / name, shapes, None if spec.is_sparse else values)
    if len(shards) > 1:
        weight_map = {
            tensor: name for name, shapes in zip(names, shards, strict=True) for tensor, _ in shapes
        }
        index = {"metadata": {"total_size": spec.size_bytes}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index))


def _write_file(
    path: Path,
    shapes: list[tuple[str, tuple[int, ...]]],
    values: Iterator[np.ndarray[Any, np.dtype[np.float32]]] | None,
) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        end = offset + _ITEM_BYTES * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT_BYTES)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if values is None:
            file.truncate(8 + len(header) + offset)
        else:
            for _ in shapes:
                file.write(next(values).data)
        file.flush()
        os.fsync(file.fileno())
