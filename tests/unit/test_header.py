"""Headers that are meant well: ours read by the reference library, and the other way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from shard_files import STORABLE, noise, open_shard, parse, reference_accepts, same

from diskoffload.errors import InvalidInputError, UnsupportedTensorError
from diskoffload.store.digests import DIGESTS_KEY
from diskoffload.store.header import (
    ALIGNMENT_BYTES,
    DTYPE_NAMES,
    FILLER_PREFIX,
    Header,
    Planned,
    build_header,
)
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

SHAPES = [(), (0,), (7,), (16, 3), (2, 0, 5), (1, 1, 9)]
planned = st.tuples(st.sampled_from(STORABLE), st.lists(st.integers(0, 9), max_size=4).map(tuple))


def plan(specs: list[tuple[torch.dtype, tuple[int, ...]]]) -> list[Planned]:
    return [(f"t{number}", dtype, shape) for number, (dtype, shape) in enumerate(specs)]


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"x.{i}": noise(dtype, shape, seed=i) for i, shape in enumerate(SHAPES)}


def write(path: Path, tensors: dict[str, torch.Tensor], fill: bool) -> None:
    items = [(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
    with ShardWriter(path, items, Files(), {"format": "pt", "é": "雪\n"}, fill=fill) as writer:
        for name, one in tensors.items():
            writer.write(name, tensor_bytes(one))
        writer.publish()


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_the_reference_reads_what_we_write(tmp_path: Path, dtype: torch.dtype, fill: bool) -> None:
    tensors = tensors_of(dtype)
    write(tmp_path / "ours.safetensors", tensors, fill)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in metadata if key != DIGESTS_KEY} == {
        "format": "pt",
        "é": "雪\n",
    }
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        names = {name for name in file.keys() if not name.startswith(FILLER_PREFIX)}  # noqa: SIM118
        assert names == tensors.keys()
        for name, tensor in tensors.items():
            assert same(file.get_tensor(name), tensor), name


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_we_read_what_the_reference_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tensors_of(dtype)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"note": "née"})
    shard = open_shard(tmp_path / "theirs.safetensors")
    assert shard.header.metadata == {"note": "née"}
    assert shard.header.specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        spec = shard.header.specs[name]
        assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
        target = torch.empty(spec.nbytes, dtype=torch.uint8)
        if spec.nbytes:
            shard.read_into(spec, tensor_bytes(target))
        assert same(target.view(dtype).reshape(spec.shape), tensor), name


def test_no_dtype_that_the_reference_writes_is_unknown_to_us() -> None:
    packed = {"float4_e2m1fn_x2"}  # below a byte: read as raw bytes
    for name, dtype in vars(torch).items():
        if not isinstance(dtype, torch.dtype) or dtype in DTYPE_NAMES or "q" in name:
            continue
        try:
            content = save({"x": noise(dtype, (4,))})
        except Exception:
            continue  # the reference cannot either
        assert name in packed, f"safetensors writes {name} and we do not"
        spec = parse(content).specs["x"]
        assert (spec.dtype, spec.shape, spec.nbytes) == (torch.uint8, (4,), 4)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"),
    [("F4", [3, 6], 9), ("F6_E2M3", [4], 3), ("F6_E3M2", [2, 4], 6), ("F4", [], None)],
)
def test_types_below_a_byte_are_raw_bytes(name: str, shape: list[int], nbytes: int | None) -> None:
    text = json.dumps({"x": {"dtype": name, "shape": shape, "data_offsets": [0, nbytes or 0]}})
    content = len(text).to_bytes(8, "little") + text.encode() + bytes(nbytes or 0)
    assert reference_accepts(content) == (nbytes is not None)
    if nbytes is None:
        with pytest.raises(ValueError, match="does not end at a byte"):
            parse(content)
        return
    spec = parse(content).specs["x"]
    assert (spec.dtype, spec.shape, spec.dtype_name) == (torch.uint8, (nbytes,), name)


def check_layout(header: Header, raw: bytes, items: list[Planned], fill: bool) -> None:
    assert len(raw) == header.data_offset
    assert header.data_offset % ALIGNMENT_BYTES == 0
    for name, dtype, shape in items:
        spec = header.specs[name]
        assert (spec.dtype, spec.shape) == (dtype, shape)
        assert spec.nbytes == torch.Size(shape).numel() * dtype.itemsize
        whole = fill or spec.nbytes % ALIGNMENT_BYTES == 0
        assert spec.offset % (ALIGNMENT_BYTES if whole else dtype.itemsize) == 0
    end = header.data_offset
    for spec in header.specs.values():  # in the order of their bytes, without holes
        assert spec.offset == end
        end += spec.nbytes
    assert end == header.file_bytes


@settings(deadline=None, max_examples=150)
@given(st.lists(planned, max_size=12), st.booleans())
def test_a_built_header_is_aligned_valid_and_true(
    specs: list[tuple[torch.dtype, tuple[int, ...]]], fill: bool
) -> None:
    items = plan(specs)
    raw, header = build_header(items, {"a": "b"}, fill=fill)
    check_layout(header, raw, items, fill)
    content = raw + bytes(header.file_bytes - len(raw))
    assert reference_accepts(content)
    assert parse(content) == header
    strangers = header.specs.keys() - {name for name, _, _ in items}
    assert all(fill and name.startswith(FILLER_PREFIX) for name in strangers)


def test_aligned_tensors_keep_the_given_order() -> None:
    items = [(name, torch.float32, (16,)) for name in "zebra"]
    _, header = build_header(items)
    assert list(header.specs) == list("zebra")


def test_no_tensor_is_a_valid_file() -> None:
    raw, header = build_header([])
    assert reference_accepts(raw)
    assert parse(raw) == header
    assert header.specs == {}


@pytest.mark.parametrize("name", ["", "a b", "ünïcödé", 'q"u\\o', "line\nbreak\0", "雪" * 500])
def test_any_name_comes_back(name: str) -> None:
    raw, header = build_header([(name, torch.uint8, (3,))])
    content = raw + b"abc"
    assert reference_accepts(content)
    assert list(parse(content).specs) == [name]
    assert header.specs[name].nbytes == 3


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32], ids=str)
def test_a_dtype_that_the_format_lacks_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedTensorError, match=r"cannot store 'w'.*complex"):
        build_header([("w", dtype, (2,))])


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(
    "names",
    [["w", "w"], ["__metadata__"], ["\ud800"]],
    ids=["twice", "reserved", "surrogate"],
)
def test_names_that_cannot_be_keys_are_refused(names: list[str], fill: bool) -> None:
    with pytest.raises(InvalidInputError, match="cannot write"):
        build_header([(name, torch.uint8, (3,)) for name in names], fill=fill)


def test_a_name_that_a_filler_has_is_refused_rather_than_lost() -> None:
    items = [("a", torch.uint8, (3,)), (f"{FILLER_PREFIX}1", torch.uint8, (3,))]
    with pytest.raises(InvalidInputError, match="cannot write"):
        build_header(items, fill=True)
