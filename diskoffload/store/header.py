"""The header of a safetensors file: parsed, trusted in nothing, and built.

A file is an 8-byte little-endian length, that many bytes of JSON (which may end in
spaces), then the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format). Files come from anyone, so every
number is checked against the file before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, NoReturn, cast

import torch

from diskoffload.errors import DamagedFileError, InvalidInputError, UnsupportedTensorError
from diskoffload.store.json_reader import JsonReader, brief

LENGTH_BYTES = 8
# The reference implementation's own bound on a header (safetensors' tensor.rs).
MAX_HEADER_BYTES = 100_000_000
# Vector loads of fp32 kernels give other bits at smaller alignments (measured).
ALIGNMENT_BYTES = 64
_MAX_DIMENSIONS = 64  # torch's own bound
# Of the JSON that describes one tensor, or is one text of the metadata. Both are far beyond
# what is written by anyone, and bound what it takes to find that out.
_MAX_ENTRY_BYTES = 1 << 16
_MAX_TEXT_BYTES = 64 << 20
_MAX_METADATA_ENTRIES = 100_000
METADATA_KEY = "__metadata__"
FILLER_PREFIX = "__filler__."

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Younger than the oldest torch we support.
if hasattr(torch, "float8_e8m0fnu"):
    DTYPE_NAMES[torch.float8_e8m0fnu] = "F8_E8M0"
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Packed below a byte: (stored dtype, elements per stored element). Read as raw bytes.
_SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class StoredSpec(NamedTuple):
    """Where one tensor lies in its file, and what it is.

    Attributes:
        name: key in the file.
        dtype: element type; ``torch.uint8`` for the types below one byte.
        shape: sizes of the dimensions, row-major, in elements of ``dtype``.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
        dtype_name: the file's own word for the type.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    dtype_name: str


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        specs: the tensors by name, in the order of their bytes.
        data_offset: where the tensors' bytes begin in the file.
        file_bytes: length of the whole file.
        metadata: the free strings of ``__metadata__``.
    """

    specs: dict[str, StoredSpec]
    data_offset: int
    file_bytes: int
    metadata: dict[str, str] = field(default_factory=dict)


def header_length(prefix: bytes, file_bytes: int, file: str) -> int:
    """Read the JSON's length from a file's first 8 bytes and check that it can be.

    Raises:
        DamagedFileError: the file is too short, or the length cannot be true.
    """
    if len(prefix) < LENGTH_BYTES:
        _refuse(file, f"it has {file_bytes} bytes and a safetensors file has at least 8")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(file, f"its header claims {length} bytes, more than the format's 100 MB")
    if length > file_bytes - LENGTH_BYTES:
        _refuse(file, f"its header claims {length} bytes and the file has {file_bytes} in all")
    return length


def parse_header(raw: bytes, file_bytes: int, file: str) -> Header:
    """Check a header's JSON and give what it says.

    Args:
        raw: the JSON, without the length before it.
        file_bytes: length of the whole file.
        file: its name, for messages.

    Raises:
        DamagedFileError: anything is not as the format demands; says what and where.
    """
    if not raw.startswith(b"{"):
        _refuse(file, "its header does not begin with '{'")
    specs, metadata = _read_json(raw, file)
    end = data_offset = LENGTH_BYTES + len(raw)
    if not _in_order(specs.values()):
        ordered = sorted(specs.values(), key=lambda spec: (spec.offset, spec.nbytes))
        specs = {spec.name: spec for spec in ordered}
    for spec in specs.values():
        if spec.offset != end:
            what = f"tensor {brief(spec.name)}"
            kind = "overlaps the tensor before it" if spec.offset < end else "leaves a hole"
            _refuse(file, f"{what} at byte {spec.offset} {kind} (expected {end})")
        end += spec.nbytes
    if end != file_bytes:
        fault = "it was truncated" if end > file_bytes else "bytes follow the last tensor"
        _refuse(file, f"its header describes {end} bytes and it has {file_bytes}: {fault}")
    return Header(specs, data_offset, file_bytes, metadata)


def _in_order(specs: Iterable[StoredSpec]) -> bool:
    end = 0
    for spec in specs:
        if spec.offset < end:
            return False
        end = spec.offset + spec.nbytes
    return True


def can_be_a_tensor(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Tell whether torch can count such a tensor's bytes, in 63 bits, empty or not."""
    if len(shape) > _MAX_DIMENSIONS:
        return False
    return prod(max(size, 1) for size in shape) * dtype.itemsize < 1 << 63


def _refuse(file: str, reason: str) -> NoReturn:
    raise DamagedFileError(
        f"{file} is not a valid safetensors file: {reason}; fetch or write it again"
    )


def _read_json(raw: bytes, file: str) -> tuple[dict[str, StoredSpec], dict[str, str]]:
    """Read the tensors in the order of their names' appearance, and the metadata."""
    data_offset = LENGTH_BYTES + len(raw)
    metadata: dict[str, str] = {}

    def refuse(reason: str) -> NoReturn:
        _refuse(file, f"its header {reason}")

    def text(key: str) -> str:
        value = reader.value(_MAX_TEXT_BYTES)
        metadata[key] = value
        if not isinstance(value, str):
            _refuse(file, "its __metadata__ is not a table of strings")
        if len(metadata) > _MAX_METADATA_ENTRIES:
            refuse(f"has more than {_MAX_METADATA_ENTRIES} entries of metadata")
        _check_text(key, file)
        _check_text(value, file)
        return value

    def one(name: str) -> StoredSpec | None:
        if name != METADATA_KEY:
            return _check_tensor(name, reader.value(_MAX_ENTRY_BYTES), data_offset, file)
        if reader.at_table():
            reader.table(text)
        elif reader.value(_MAX_ENTRY_BYTES) is not None:
            _refuse(file, "its __metadata__ is not a table of strings")
        return None

    reader = JsonReader(raw, refuse)
    found = reader.table(one)
    reader.finish()
    found.pop(METADATA_KEY, None)
    return cast(dict[str, StoredSpec], found), metadata


def _check_text(text: str, file: str) -> None:
    # JSON can escape half a character, which nothing can write again.
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(file, f"{brief(text)} in its header is not Unicode")


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for number in value:  # noqa: SIM110 - all() takes twice as long, and a file has thousands
        # A bool is an int, but no size.
        if type(number) is not int or not 0 <= number < 1 << 63:
            return False
    return True


def _check_tensor(name: str, value: Any, data_offset: int, file: str) -> StoredSpec:
    _check_text(name, file)

    def refuse(reason: str) -> NoReturn:
        _refuse(file, f"tensor {brief(name)} {reason}")

    try:
        dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError):
        refuse("lacks one of dtype, shape and data_offsets")
    if not _are_sizes(shape):
        refuse(f"has the shape {brief(shape)}")
    if len(shape) > _MAX_DIMENSIONS:
        refuse(f"has {len(shape)} dimensions")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse(f"has the data_offsets {brief(offsets)}")
    nbytes = offsets[1] - offsets[0]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None and isinstance(dtype_name, str) and dtype_name in _SUB_BYTE_BITS:
        bits = prod(shape) * _SUB_BYTE_BITS[dtype_name]
        if bits % 8:
            refuse("does not end at a byte")
        dtype, shape = torch.uint8, [bits // 8]
    if dtype is None:
        refuse(f"has the unknown dtype {brief(dtype_name)}")
    fits = prod(shape) * dtype.itemsize == nbytes
    if not fits or (nbytes == 0 and not can_be_a_tensor(dtype, shape)):
        refuse(f"of dtype {dtype_name} and shape {brief(shape)} cannot take {nbytes} bytes")
    return StoredSpec(name, dtype, tuple(shape), data_offset + offsets[0], nbytes, dtype_name)


Planned = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: its key in the file, dtype and shape."""


def build_header(
    tensors: Iterable[Planned], metadata: Mapping[str, str] | None = None, *, fill: bool = False
) -> tuple[bytes, Header]:
    """Plan a file: the bytes that come before the data, and where each tensor goes.

    The data begins at a multiple of 64 bytes. Tensors are laid out in the given order
    but for this: those whose length is a multiple of 64 bytes come first, so that they
    stay aligned, and then the others from the largest element to the smallest, so that
    each is at least aligned to its element (the format allows no padding between them).

    Args:
        tensors: what will be written.
        metadata: free strings, stored beside them.
        fill: align every tensor to 64 bytes, by filler tensors (``__filler__.N``) between
            them; meant for offload folders, since a reader of a checkpoint would see them.

    Raises:
        UnsupportedTensorError: a dtype that safetensors does not know.
        InvalidInputError: a name that cannot be a key, or one that two tensors have.
    """
    items = list(tensors)
    for name, dtype, _ in items:
        if dtype not in DTYPE_NAMES:
            raise UnsupportedTensorError(
                f"cannot store {name!r}: safetensors has no dtype for {dtype}; "
                "convert the tensor, or keep it in memory"
            )
    items.sort(key=_rank)
    placed: list[tuple[Planned, int]] = []
    start = 0
    for number, item in enumerate(items):
        gap = -start % ALIGNMENT_BYTES
        if fill and gap:
            placed.append(((f"{FILLER_PREFIX}{number}", torch.uint8, (gap,)), start))
            start += gap
        placed.append((item, start))
        start += _nbytes(item)
    return build_header_of(placed, metadata)


def build_header_of(
    placed: Sequence[tuple[Planned, int]],
    metadata: Mapping[str, str] | None,
    data_offset: int | None = None,
) -> tuple[bytes, Header]:
    """Describe tensors that lie one after the other; see :func:`build_header`.

    Args:
        placed: each tensor, in order, and where it begins among the tensors' bytes.
        metadata: free strings, stored beside them.
        data_offset: where the tensors begin in the file, if that is decided.

    Raises:
        InvalidInputError: a name that cannot be a key, or that two have; more than the format
            allows, or than there is room for.
    """
    _check_names([item[0] for item, _ in placed])
    content: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for (name, dtype, shape), begin in placed:
        content[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, begin + _nbytes((name, dtype, shape))],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    needed_bytes = LENGTH_BYTES + len(text)
    if data_offset is None:
        data_offset = -(-needed_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    if needed_bytes > min(data_offset, MAX_HEADER_BYTES):
        raise InvalidInputError(
            f"cannot write a file of {len(placed)} tensors: its header would take {needed_bytes} "
            f"bytes and has {min(data_offset, MAX_HEADER_BYTES)}; divide them over more files"
        )
    text = text.ljust(data_offset - LENGTH_BYTES)
    specs = {
        item[0]: StoredSpec(*item, data_offset + begin, _nbytes(item), DTYPE_NAMES[item[1]])
        for item, begin in placed
    }
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    end = placed[-1][1] + _nbytes(placed[-1][0]) if placed else 0
    return raw, Header(specs, data_offset, data_offset + end, dict(metadata or {}))


def _check_names(names: list[str]) -> None:
    """Refuse what would make an invalid file, or one that lacks a tensor."""
    seen = {METADATA_KEY}
    for name in names:
        if name in seen:
            fault = "two tensors have this name, or the format needs it"
        elif not name.isascii() and name != name.encode("utf-8", "replace").decode("utf-8"):
            fault = "it is not Unicode"
        else:
            seen.add(name)
            continue
        raise InvalidInputError(
            f"cannot write a tensor named {brief(name)}: {fault}; give it another name"
        )


def _nbytes(item: Planned) -> int:
    return prod(item[2]) * item[1].itemsize


def _rank(item: Planned) -> tuple[bool, int]:
    # Among the aligned the given order stays; sort() is stable.
    ragged = _nbytes(item) % ALIGNMENT_BYTES != 0
    return ragged, -item[1].itemsize if ragged else 0
