"""Safetensors files for the store's tests, and what the reference library says of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import zstandard

import diskoffload
from diskoffload.store.header import DTYPE_NAMES, Header, header_length, parse_header
from diskoffload.store.shard import Shard
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

STORABLE = sorted(DTYPE_NAMES, key=str)


def file_bytes(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    """Put a file together: ``header`` is JSON text, or something to make JSON of."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8")
    length = len(text) if claimed is None else claimed
    return length.to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """Describe a tensor of four bytes at the data's start, but for what is changed."""
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}


def parse(content: bytes, name: str = "some.safetensors") -> Header:
    """Parse a whole file's bytes the way :class:`Shard` parses a file."""
    length = header_length(content[:8], len(content), name)
    return parse_header(content[8 : 8 + length], len(content), name)


def reference_accepts(content: bytes) -> bool:
    """Ask the safetensors library whether a file is valid."""
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def open_shard(path: Path) -> Shard:
    return Shard(path, Files())


def noise(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Make a tensor of random bits, NaNs and all, that are legal for its dtype."""
    numbers = torch.Generator().manual_seed(seed)
    nbytes = math.prod(shape) * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, limit, (nbytes,), dtype=torch.uint8, generator=numbers)
    return bits.view(dtype).reshape(shape)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare dtype, shape and every bit."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    plain = [one.detach().resolve_conj().resolve_neg().contiguous() for one in (first, second)]
    return alike and bytes(tensor_bytes(plain[0])) == bytes(tensor_bytes(plain[1]))


FRAME_CHUNK_BYTES = 4 << 20


def frames_of(data: bytes | memoryview) -> list[bytes]:
    """Pack bytes as the codec "zstd" of earlier versions did; nothing writes that any more."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    starts = range(0, len(data), FRAME_CHUNK_BYTES)
    return [compressor.compress(data[start : start + FRAME_CHUNK_BYTES]) for start in starts]


def mappings_of(path: Path) -> int:
    """Count this process' mappings of a file."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(str(path) in line for line in lines)


def descriptors_of(path: Path) -> int:
    """Count this process' open descriptors of a file."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}") == str(path)
        except OSError:
            continue
    return count


def in_child(work: Callable[[], object]) -> object:
    """Do something in a forked process, which may limit itself, and give its answer."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer: object = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found: object = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return found


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start another interpreter, with our package in reach."""
    root = str(Path(diskoffload.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(script: str, *arguments: object) -> str:
    """Run a script to its end and give what it printed; a failure shows its traceback."""
    process = start_python(script, *arguments)
    out, err = process.communicate(timeout=120)
    if process.returncode != 0:
        raise RuntimeError(f"the script ended with {process.returncode}:\n{err}")
    return out
