"""Whether compression pays in a folder: how fast its disk is, and how fast this machine decodes.

Both are measured, in a fraction of a second. A folder, and what is written to it, keeps what was
found: the disk's speed drifts, and one model's tensors should not be treated in two ways.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diskoffload.budget import format_bytes
from diskoffload.store.codec import WritingCodec, codec_named
from diskoffload.store.compression import DEFAULT
from diskoffload.store.packing import pack
from diskoffload.store.parallel import share, threads_for
from diskoffload.store.workspace import Workspace
from diskoffload.system.files import Files
from diskoffload.system.memory import Memory, anonymous

_log = logging.getLogger(__name__)

# A faster disk by a little is not worth decoding for, and both figures drift.
_MARGIN = 1.1
_STEP_BYTES = 4 << 20
_MOST_STEPS = 16
_MOST_SECONDS = 0.25
_SAMPLE_BYTES = 16 << 20
_ROUNDS = 3


@dataclass(frozen=True)
class Payoff:
    """What was measured, in bytes a second, and what follows.

    Attributes:
        reads: how fast the folder's disk is read, past the page cache where that can be.
        writes: how fast it is written.
        decodes: how fast bfloat16 weights are decoded, of their own bytes.
        encodes: how fast they are packed.
        share: what share of its bytes such a weight takes when it is packed.
        threads: how many threads did that.
        is_past_cache: whether the disk was read, rather than perhaps the page cache.
    """

    reads: float
    writes: float
    decodes: float
    encodes: float
    share: float
    threads: int
    is_past_cache: bool

    @property
    def pays(self) -> bool:
        """Whether compressed weights are read sooner: the disk is slower than the decoder."""
        return self.reads * _MARGIN < self.decodes

    def __str__(self) -> str:
        disk = f"the disk reads {format_bytes(int(self.reads))}/s"
        if not self.is_past_cache:
            disk += " (perhaps from the page cache: it cannot be read past it)"
        sooner = min(self.reads / self.share, self.decodes)
        return (
            f"{disk} and writes {format_bytes(int(self.writes))}/s; {self.threads} threads decode "
            f"bfloat16 at {format_bytes(int(self.decodes))}/s and pack it at "
            f"{format_bytes(int(self.encodes))}/s, to {self.share:.2f} of its size; so compressed "
            f"weights would be read at {format_bytes(int(sooner))}/s"
        )


class AutoCompression:
    """Finds out once, when it is first asked, whether compression pays in a folder. Thread-safe."""

    def __init__(self, folder: Path, files: Files) -> None:
        """Measure nothing yet."""
        self._folder = folder
        self._files = files
        self._lock = threading.Lock()
        self._found: Payoff | None = None

    def codec(self) -> str | None:
        """Give the way to compress, or ``None`` if none pays.

        Raises:
            StorageError: the folder cannot be written to or read.
        """
        with self._lock:
            if self._found is None:
                self._found = measure_payoff(self._folder, self._files)
                _log.info(
                    'compression="auto" in %s: %s, because %s',
                    self._folder,
                    f'"{DEFAULT}"' if self._found.pays else "none",
                    self._found,
                )
            return DEFAULT if self._found.pays else None


def measure_payoff(folder: Path, files: Files) -> Payoff:
    """Measure a folder's disk and the codec, with a file of 64 MiB at the most that goes at once.

    Raises:
        StorageError: the folder cannot be written to or read.
    """
    reads, writes, is_past_cache = _measure_disk(folder, files)
    decodes, encodes, share_of_size = _measure_codec(codec_named(DEFAULT))
    return Payoff(
        reads, writes, decodes, encodes, share_of_size, threads_for(_MOST_STEPS), is_past_cache
    )


def _measure_disk(folder: Path, files: Files) -> tuple[float, float, bool]:
    path = folder / f".diskoffload-probe.{time.monotonic_ns():x}"
    opened = [files.create(path)]
    try:
        fd = opened[0]
        direct = files.open_for_writing_past_cache(path)
        opened += [] if direct is None else [direct]
        past_cache = files.open_past_cache(path)
        opened += [] if past_cache is None else [past_cache]
        files.remove(path)  # at once, so that a process that is killed leaves nothing
        step = anonymous(_STEP_BYTES)
        noise = np.random.default_rng(0).integers(0, 256, _STEP_BYTES, np.uint8)
        step.view(0, _STEP_BYTES)[:] = noise.data  # some disks compress
        writes, count = _write(fd if direct is None else direct, fd, step, path, files)
        files.drop_from_cache(fd, 0, 0)
        reads = _read(fd, past_cache, count, step, path, files)
    except BaseException:
        files.remove(path)
        raise
    finally:
        for one in reversed(opened):
            files.close(one)
    return reads, writes, past_cache is not None


def _write(target: int, fd: int, step: Memory, path: Path, files: Files) -> tuple[float, int]:
    count, began_seconds = 0, time.perf_counter()
    for _ in _steps():
        files.write(target, step.view(0, _STEP_BYTES), count * _STEP_BYTES, path)
        count += 1
    files.sync(fd, path)
    return count * _STEP_BYTES / (time.perf_counter() - began_seconds), count


def _read(
    fd: int, past_cache: int | None, count: int, step: Memory, path: Path, files: Files
) -> float:
    read_bytes, began_seconds = 0, time.perf_counter()
    for number in _steps(count):
        target, at = step.view(0, _STEP_BYTES), number * _STEP_BYTES
        if past_cache is None:
            files.read_into(fd, target, at, path)
        else:
            files.read_blocks(past_cache, target, at, _STEP_BYTES, path)
        read_bytes += _STEP_BYTES
    return read_bytes / (time.perf_counter() - began_seconds)


def _steps(most: int = _MOST_STEPS) -> Iterator[int]:
    """Count as long as there is time; once at the least."""
    end_seconds = time.perf_counter() + _MOST_SECONDS
    for number in range(most):
        yield number
        if time.perf_counter() >= end_seconds:
            return


def _measure_codec(codec: WritingCodec) -> tuple[float, float, float]:
    """Pack and decode what looks like weights, the best of some rounds."""
    # Not by torch, whose modes and defaults are the caller's. The upper halves are bfloat16.
    weights = np.random.default_rng(0).standard_normal(_SAMPLE_BYTES // 2, np.float32)
    data = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data
    encoded_seconds = decoded_seconds = float("inf")
    packed_bytes = len(data)
    for _ in range(_ROUNDS):
        began_seconds = time.perf_counter()
        packed = pack(data, 2, codec)
        encoded_seconds = min(encoded_seconds, time.perf_counter() - began_seconds)
        assert packed is not None  # weights save a third
        packed_bytes = packed.nbytes
        target = np.empty(len(data), np.uint8).data
        began_seconds = time.perf_counter()
        _decode(codec, packed.chunks, target)
        decoded_seconds = min(decoded_seconds, time.perf_counter() - began_seconds)
    return len(data) / decoded_seconds, len(data) / encoded_seconds, packed_bytes / len(data)


def _decode(codec: WritingCodec, chunks: list[memoryview], target: memoryview) -> None:
    def work(numbers: Iterator[int]) -> None:
        workspace = Workspace()
        for number in numbers:
            start = number * codec.chunk_bytes
            part = target[start : start + codec.chunk_bytes]
            codec.unpack_chunk(chunks[number], part, start, 2, workspace, "a sample")

    share(len(chunks), work)
