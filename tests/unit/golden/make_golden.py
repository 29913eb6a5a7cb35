"""Writes the golden files with what is installed. They are not to be written anew.

``python tests/unit/golden/make_golden.py FOLDER`` is for a new version of the format, whose files
get names of their own; those of older versions stay, to be read for ever.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diskoffload.packing import pack_checkpoint
from diskoffload.store.folder import Folder

COUNT = 600


def golden_values() -> dict[str, torch.Tensor]:
    """Make values without random numbers, the same on every machine and in every version."""
    steps = torch.arange(COUNT, dtype=torch.int64)
    # Exact in every step: the top bits of a multiplicative sequence, as exponents and signs.
    mixed = (steps * 2654435761) % 4294967296
    bits = ((mixed >> 20) & 0x807F) | (((mixed >> 9) & 3) + 120 << 7)
    bfloat16 = bits.to(torch.uint16).view(torch.bfloat16)
    float32 = (bits << 16 | (mixed & 0xFFFF)).to(torch.int32).view(torch.float32)
    return {
        "bfloat16": bfloat16.reshape(20, 30),
        "float32": float32,
        "float32 of bfloat16": bfloat16.float(),
        "float64 of float32": float32.double(),
        "complex128": torch.complex(float32.double(), bfloat16.double()),
        "int8": (mixed % 5).to(torch.int8),
        "int64": steps,
        "bool": steps % 100 == 0,
        "odd": torch.full((601, 3), 7, dtype=torch.int16),
        "large constant": torch.zeros(1_048_577, dtype=torch.bfloat16),
        "noise": (mixed >> 13 & 0xFF).to(torch.uint8)[:64],
        "empty": torch.empty(0, 4),
    }


def main(place: Path) -> None:
    """Write one shard with every value, and a packed file with nearly every one."""
    folder = Folder(place / "offload")
    for name, value in golden_values().items():
        folder.put(name, value, "zstd")
    folder.flush()
    (shard,) = folder.shards()
    (place / "zstd-planes-1.safetensors").write_bytes(shard.path.read_bytes())
    source = place / "source.safetensors"
    values = golden_values()
    del values["complex128"]  # of which the format knows nothing
    save_file(values, source, {"format": "pt"})
    pack_checkpoint(source, place / "packed")
    (place / "packed" / source.name).rename(place / "packed-1.safetensors")
    print("the source of packed-1.safetensors:", hashlib.sha256(source.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
