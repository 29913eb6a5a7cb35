"""What ``fuzz.py`` feeds: each target turns bytes into a file, reads it, and checks what it got.

What a file says is read a second time with ``json.loads`` and compared with what we made of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import zstandard

from diskoffload.checkpoint import source
from diskoffload.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint
from diskoffload.errors import OffloadError
from diskoffload.store import (
    codec,
    digests,
    encoded,
    header,
    json_reader,
    shard,
    stored,
    zstd_frames,
    zstd_planes,
)
from diskoffload.store.codec import codec_named
from diskoffload.store.digests import DIGESTS_KEY
from diskoffload.store.encoded import ENCODING_KEY, EncodedTensor, encoding_of
from diskoffload.store.header import DTYPES, Header, header_length, parse_header
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.store.workspace import Workspace
from diskoffload.store.zstd_frames import Zstd
from diskoffload.system.files import Files

INSTRUMENTED: list[ModuleType] = [
    *(codec, digests, encoded, header, json_reader, shard, source, stored),
    *(zstd_frames, zstd_planes),
]
TOKENS = [
    *(b"0", b"1", b"-1", b"4", b"1e9", b"4.0", b"NaN", b"null", b"true", b"[]", b"{}", b'""'),
    *(b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551616", b"9" * 5000, b"[" * 2000, b'{"":' * 1200, b"\\ud800", b"\\u0000"),
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"weight_map"', b'"chunks"'),
    *(
        b'"codec"',
        b'"raw"',
        b'"zstd"',
        b'"zstd-planes"',
        b'"version"',
        b'"a":',
        b"../",
        b"\0",
        b"\xff",
        b"\xc3\xa9",
        b"\n",
        b" ",
    ),
    *(f'"{name}"'.encode() for name in DTYPES),
    *(b'"F4"', b'"complex32"', b'"bits8"', b'"quint4x2"', b'"uint4"', b'"int8"', b'"onnx"'),
    *(b"one.safetensors", b"two.safetensors", b"folder", b"pipe", b"link", b"loop"),
]
_MOST_LOADED_BYTES = 32 << 20
# 4 MiB in a frame of 128 bytes, or 1 MiB in a chunk of 32.
_MOST_TIMES_SMALLER = 32768
_SPLIT = b"\n\n"


class Finding(Exception):
    """What was read is not what the file says, or took what it must not."""


def expect(holds: bool, otherwise: str) -> None:
    """Raise :class:`Finding` unless something holds."""
    if not holds:
        raise Finding(otherwise)


class Target(Protocol):
    """Something that reads files of others."""

    def seeds(self) -> list[bytes]:
        """Give inputs to begin with."""

    def __call__(self, data: bytes) -> None:
        """Read one input and check what was read; a refusal is an ``OffloadError``."""


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Describe a tensor as a header does."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(said: bytes, data: bytes) -> bytes:
    """Put a safetensors file together."""
    return len(said).to_bytes(8, "little") + said + data


def _write(path: Path, content: bytes) -> None:
    # A new file, for ext4 waits for the disk where an old one was emptied.
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _outcome(text: bytes, file_bytes: int, *, small: bool) -> Header | None:
    # Inputs are shorter than the pieces that files are read in, whose ends matter.
    whole_bytes = json_reader._PIECE_BYTES
    json_reader._PIECE_BYTES = 24 if small else whole_bytes
    try:
        return parse_header(text, file_bytes, "a file")
    except OffloadError:
        return None
    finally:
        json_reader._PIECE_BYTES = whole_bytes


class HeaderTarget:
    """A header alone.

    An input that begins with an even byte is a whole file; any other is the JSON, to which the
    right length is put before and as many bytes behind as the two after the first one say. The
    second bit of that byte has the JSON read in small pieces, too, with the same outcome.
    """

    def __init__(self, place: Path) -> None:
        del place  # nothing is written

    def seeds(self) -> list[bytes]:
        """Give headers as they should be, and whole files."""
        several = {
            "__metadata__": {"format": "pt", "é": "雪"},
            "a": {"more": [-1.5e30, 2e-30, 0.25, None], **entry("F32", [2, 3], 0, 24)},
            "b": entry("BF16", [4], 24, 32),
            "c": entry("F4", [2, 2], 32, 34),
            "none": entry("I64", [0, 4], 34, 34),
        }
        texts = [({}, 0), ({"a": entry("U8", [4], 0, 4)}, 4), (several, 34)]
        made = []
        for content, nbytes in texts:
            said = json.dumps(content).encode()
            for small in (0, 2):
                made.append(bytes([1 + small]) + nbytes.to_bytes(2, "little") + said)
                made.append(bytes([small]) + file_of(said + b"   ", bytes(nbytes)))
        return made

    def __call__(self, data: bytes) -> None:
        """Parse it, and see that every tensor is what the JSON says and where."""
        data = data or b"\0"
        if data[0] % 2:
            content = file_of(data[3:], bytes(int.from_bytes(data[1:3], "little")))
        else:
            content = data[1:]
        length = header_length(content[:8], len(content), "a file")
        text = content[8 : 8 + length]
        if data[0] & 2:
            whole, pieces = (_outcome(text, len(content), small=one) for one in (False, True))
            expect(whole == pieces, "in small pieces it is read as something else")
        found = parse_header(text, len(content), "a file")
        said = json.loads(text)
        said.pop("__metadata__", None)
        expect(found.specs.keys() == said.keys(), "other names")
        end = found.data_offset
        for name, spec in found.specs.items():
            one = said[name]
            if one["dtype"] in DTYPES:
                same = (DTYPES[one["dtype"]], tuple(one["shape"])) == (spec.dtype, spec.shape)
                expect(same, "another dtype or shape")
            start = spec.offset - 8 - length
            expect(one["data_offsets"] == [start, start + spec.nbytes], "another place")
            expect(spec.offset == end, "a hole or an overlap")
            end += spec.nbytes
            like = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            expect(like.numel() * like.itemsize == spec.nbytes, "another length")
        expect(end == len(content), "another end")


class IndexTarget:
    """A checkpoint's index, or, after an odd first byte, its config."""

    def __init__(self, place: Path) -> None:
        self._folder = place / "checkpoint"
        self._folder.mkdir()
        self._index = self._folder / INDEX_NAME
        self._config = self._folder / CONFIG_NAME
        self._shards = {
            "one.safetensors": {"a": entry("U8", [4], 0, 4), "b": entry("F32", [], 4, 8)},
            "two.safetensors": {"c": entry("BF16", [2, 2], 0, 8)},
        }
        for name, content in self._shards.items():
            (self._folder / name).write_bytes(file_of(json.dumps(content).encode(), bytes(8)))
        (self._folder / "folder").mkdir()
        os.mkfifo(self._folder / "pipe")
        (self._folder / "link").symlink_to("one.safetensors")
        (self._folder / "loop").symlink_to("loop")

    def seeds(self) -> list[bytes]:
        """Give indexes and configs as they should be."""
        whole = {name: file for file, tensors in self._shards.items() for name in tensors}
        odd = {"a": "link", "b": "one.safetensors"}
        indexes = [{"metadata": {"total_size": 16}, "weight_map": one} for one in (whole, odd)]
        config = {"architectures": ["X"], "n": 1.5, "deep": {"a": [None, True]}}
        return [
            *(b"\0" + json.dumps(index, indent=1).encode() for index in indexes),
            b"\1" + json.dumps(config).encode(),
        ]

    def __call__(self, data: bytes) -> None:
        """Open the checkpoint, and see that it holds what the index says."""
        if data[:1] and data[0] % 2:
            _write(self._config, data[1:])
            _write(self._index, b'{"weight_map":{"a":"one.safetensors"}}')
        else:
            self._config.unlink(missing_ok=True)
            _write(self._index, data[1:])
        checkpoint = Checkpoint(self._folder)
        said = json.loads(self._index.read_bytes())["weight_map"]
        expect(checkpoint.tensors.keys() == said.keys(), "other names")
        known = {*self._shards, "link"}
        expect({*checkpoint.shards} == {*said.values()} <= known, "other shards")
        for name, file in said.items():
            one = self._shards["one.safetensors" if file == "link" else file][name]
            value = checkpoint.tensors[name].load()
            same = (value.dtype, list(value.shape)) == (DTYPES[one["dtype"]], one["shape"])
            expect(same, "another dtype or shape")


def _parts(value: memoryview, chunk_bytes: int) -> list[memoryview]:
    return [value[start : start + chunk_bytes] for start in range(0, len(value), chunk_bytes)]


class PackedTarget:
    """One packed tensor: what is said of it, two line ends, and its bytes.

    After an odd first byte it is the digests that are said.
    """

    def __init__(self, place: Path) -> None:
        self._path = place / "packed.safetensors"

    def seeds(self) -> list[bytes]:
        """Give tensors packed as they should be, with and without checksums."""
        made: list[tuple[dict[str, Any], bytes]] = []
        frames, planes = Zstd(), codec_named("zstd")
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        careless = zstandard.ZstdCompressor(level=1)
        for nbytes in (4, 1000, frames.chunk_bytes + 8):
            value = memoryview(bytes(range(4)) * (nbytes // 4))
            said = {"dtype": "float32", "shape": [nbytes // 4]}
            parts = _parts(value, frames.chunk_bytes)
            for tool in (compressor, careless):
                chunks = [tool.compress(part) for part in parts]
                sizes = [*map(len, chunks)]
                made.append(({"codec": "zstd", **said, "chunks": sizes}, b"".join(chunks)))
            chunks = [
                b"".join(planes.pack_chunk(part, number * planes.chunk_bytes, 4, Workspace()))
                for number, part in enumerate(_parts(value, planes.chunk_bytes))
            ]
            encoding = encoding_of(torch.float32, (nbytes // 4,), planes, [*map(len, chunks)])
            made.append((encoding, b"".join(chunks)))
        made.append(({"codec": "raw", "dtype": "complex32", "shape": [2]}, bytes(8)))
        made.append(({"codec": "raw", "dtype": "float4_e2m1fn_x2", "shape": [2, 2]}, bytes(4)))
        packed = [b"\0" + json.dumps({"a": said}).encode() + _SPLIT + data for said, data in made]
        return [*packed, b"\1" + json.dumps({"a": "0" * 32}).encode() + _SPLIT + bytes(4)]

    def __call__(self, data: bytes) -> None:
        """Read the tensor, and see that it is what was said."""
        text, _, packed = data[1:].partition(_SPLIT)
        key = DIGESTS_KEY if data[:1] and data[0] % 2 else ENCODING_KEY
        said = text.decode("utf-8", "replace")
        content = {"__metadata__": {key: said}, "a": entry("U8", [len(packed)], 0, len(packed))}
        _write(self._path, file_of(json.dumps(content).encode(), packed))
        tensor = stored_tensors(Shard(self._path, Files()))["a"]
        dtype, shape = torch.uint8, [len(packed)]
        if isinstance(tensor, EncodedTensor):
            one = json.loads(said)["a"]
            dtype, shape = getattr(torch, one["dtype"]), one["shape"]
        nbytes = prod(shape) * dtype.itemsize
        expect(nbytes <= len(packed) * _MOST_TIMES_SMALLER, "more than can be packed")
        if nbytes > _MOST_LOADED_BYTES:
            return
        for value in (tensor, tensor.load(), tensor.mapped()):
            same = value is None or (value.dtype, list(value.shape)) == (dtype, shape)
            expect(same, "another dtype or shape")


TARGETS: dict[str, Callable[[Path], Target]] = {
    "header": HeaderTarget,
    "index": IndexTarget,
    "packed": PackedTarget,
}
