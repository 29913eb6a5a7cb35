"""Files of every version of the format are read for ever, and newer ones refused by name."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from golden.make_golden import golden_values
from safetensors import safe_open
from shard_files import open_shard, same

from diskoffload.errors import DamagedFileError
from diskoffload.inspect import inspect_path
from diskoffload.packing import unpack_checkpoint
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.stored import stored_tensors
from diskoffload.verifying import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

GOLDEN = Path(__file__).parent / "golden"
PACKED_SOURCE_SHA256 = "17d457b6e9832ea3fae71e7b43d2bbf490518e591cf99e343b07f989699c31ed"
FILES = {"zstd-1.safetensors": "zstd", "zstd-planes-1.safetensors": "zstd-planes"}


@pytest.mark.parametrize("file", FILES)
def test_golden_files_are_read(file: str) -> None:
    found = stored_tensors(open_shard(GOLDEN / file))
    expected = golden_values()
    assert {name for name in found if not name.startswith(FILLER_PREFIX)} == expected.keys()
    for name, value in expected.items():
        assert same(found[name].load(), value), name
        if len(value) > 40:
            assert same(found[name].load_rows(3, 40), value[3:40]), name
    assert {one.codec_name for one in found.values() if isinstance(one, EncodedTensor)} >= {
        FILES[file]
    }
    checked = verify(GOLDEN / file)
    assert (checked.checked, checked.unchecked, checked.faults) == (len(expected), 0, [])


def test_a_golden_packed_file_gives_back_its_source(tmp_path: Path) -> None:
    unpack_checkpoint(GOLDEN / "packed-1.safetensors", tmp_path / "out")
    found = (tmp_path / "out" / "packed-1.safetensors").read_bytes()
    assert hashlib.sha256(found).hexdigest() == PACKED_SOURCE_SHA256


def said_by(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Read a file with the reference library alone."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), {name: value.tobytes() for name, value in tensors.items()}


def test_a_second_reader_can_be_written_from_the_description() -> None:
    """One that knows ``docs/format.md`` and none of our code."""
    metadata, tensors = said_by(GOLDEN / "zstd-planes-1.safetensors")
    encodings = json.loads(metadata["diskoffload.encoding"])
    digests = json.loads(metadata["diskoffload.digests"])
    expected = golden_values()
    assert len(encodings) == 10
    for name, encoding in encodings.items():
        assert (encoding["codec"], encoding["version"]) == ("zstd-planes", 1)
        assert xxhash.xxh3_128_hexdigest(tensors[name]) == digests[name]
        value, at = b"", 0
        for length in encoding["chunks"]:
            packed = tensors[name][at : at + length]
            at += length
            checksum, start, nbytes, size = struct.unpack_from("<QQIB", packed)
            assert checksum == xxhash.xxh3_64_intdigest(packed[8:])
            assert start == len(value)
            elements = np.empty((nbytes // size, size), np.uint8)
            begin = 24 + 8 * size
            for plane in range(size):
                kind, constant, _, stored = struct.unpack_from("<BBHI", packed, 24 + 8 * plane)
                content = packed[begin : begin + stored]
                begin += stored
                if kind == 1:
                    content = zstandard.ZstdDecompressor().decompress(content)
                elements[:, plane] = constant if kind == 2 else np.frombuffer(content, np.uint8)
            value += elements.tobytes()
        made = torch.frombuffer(bytearray(value), dtype=getattr(torch, encoding["dtype"]))
        assert same(made.reshape(encoding["shape"]), expected[name])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"version\\": 1', '"version\\": 2', "with version 2 of the codec 'zstd-planes', and up"),
        (
            '"zstd-planes\\"',
            '"zstd-plains\\"',
            "the unknown codec 'zstd-plains' .known: zstd, ",
        ),
    ],
)
def test_a_newer_format_is_refused_by_its_name(
    tmp_path: Path, old: str, new: str, found: str
) -> None:
    path = tmp_path / "newer.safetensors"
    raw = (GOLDEN / "zstd-planes-1.safetensors").read_bytes()
    assert raw.count(old.encode()) == 10
    raw = raw.replace(old.encode(), new.encode())
    # A newer file has the checksum of its own header; here it is as good to have none.
    for word in (b"diskoffload.digests", b'{\\"__metadata__\\": '):
        raw = raw.replace(word, word.swapcase())
    path.write_bytes(raw)
    with pytest.raises(DamagedFileError, match=rf"newer\.safetensors, tensor '.*{found}") as caught:
        stored_tensors(open_shard(path))
    assert "a newer diskoffload may read it" in str(caught.value)
    (shard,) = inspect_path(path).shards
    assert shard.fault == str(caught.value)
