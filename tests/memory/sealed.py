"""A checkpoint that nobody may change, large beside the memory limit of these tests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

# Room for the interpreter with torch, transformers and compressed-tensors (290 MB of
# anonymous memory, measured) and for what is worked on; the checkpoint is twice as large.
LIMIT_BYTES = 512 << 20
CHECKPOINT_BYTES = 1_150_000_000


@dataclass(frozen=True)
class Sealed:
    """A checkpoint with the fingerprint it had at first.

    Attributes:
        path: its folder.
        size_bytes: of all its shards.
        fingerprint: of names, bytes and times of change of everything in it.
    """

    path: Path
    size_bytes: int
    fingerprint: str

    def is_unchanged(self) -> bool:
        """Read it all again and compare."""
        return fingerprint(self.path) == self.fingerprint

    def leave_page_cache(self) -> None:
        """Make the next reader fetch it from the disk, and be charged for its pages."""
        for path in self.path.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fingerprint(folder: Path) -> str:
    """Digest every file below a folder: its name, bytes and time of change."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}\n".encode())
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(8 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def files_of_tensors(folder: Path) -> dict[str, Any]:
    """Open a folder's shards with the safetensors library; by tensor, the file that has it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, "pt")
        found.update(dict.fromkeys(file.keys(), file))
    return found


def largest_layer_bytes(tensors: dict[str, Any]) -> int:
    """Size up the decoder layers, and the tensors that stand alone beside them."""
    sizes: dict[str, int] = {}
    for name, file in tensors.items():
        parts = name.split(".")
        layer = ".".join(parts[:3]) if "layers" in parts else name
        count = torch.Size(file.get_slice(name).get_shape()).numel()
        sizes[layer] = sizes.get(layer, 0) + count * torch.bfloat16.itemsize
    return max(sizes.values())
