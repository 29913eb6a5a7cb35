"""The queue to disk: nothing is lost, nothing is written twice, nothing is stored unsaid."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from shard_files import STORABLE, noise, reference_accepts
from writer_bench import KIB, MIB, Bench, check_stored

from diskoffload.errors import (
    UnsupportedTensorError,
)
from diskoffload.store import writer
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import ALIGNMENT_BYTES, FILLER_PREFIX
from diskoffload.store.packing import pack
from diskoffload.store.stored import ShardTensor, StridedTensor
from diskoffload.system.files import Files

pytestmark = pytest.mark.usefixtures("no_leaks")


# ---------------------------------------------------------------------------- gathering


def test_nothing_is_written_before_it_must_be(bench: Bench) -> None:
    before = set(threading.enumerate())
    tickets = [bench.put(torch.zeros(KIB)) for _ in range(100)]
    assert bench.names() == []
    assert bench.writer.written_groups == 0
    assert all(ticket.stored is None for ticket in tickets)
    assert set(threading.enumerate()) <= before


def test_groups_become_files(make: Callable[..., Bench]) -> None:
    bench = make(group_bytes=64 * KIB)
    tickets = [bench.put(noise(torch.uint8, (16 * KIB,), n), name=f"t{n}") for n in range(10)]
    bench.writer.flush()
    assert len(bench.shards) == bench.writer.written_groups == 3  # 4 + 4 + 2
    assert [len([k for k in s.header.specs if k[0] == "t"]) for s in bench.shards] == [4, 4, 2]
    for number, ticket in enumerate(tickets):
        check_stored(ticket, noise(torch.uint8, (16 * KIB,), number))


def test_five_thousand_tensors_make_one_file(make: Callable[..., Bench]) -> None:
    bench = make(group_bytes=256 * MIB)
    tickets = [bench.put(torch.full((4 * KIB,), n, dtype=torch.int32)) for n in range(5000)]
    bench.writer.flush()
    assert len(bench.names()) <= 2
    values = [ticket.stored.mapped() for ticket in tickets if ticket.stored is not None]
    assert [int(one[-1]) for one in values if one is not None] == list(range(5000))
    with safe_open(bench.folder / bench.names()[0], framework="pt") as file:
        assert len(file.keys()) >= 2500


def test_one_larger_than_a_group_is_a_file(make: Callable[..., Bench]) -> None:
    bench = make(group_bytes=KIB)
    ticket = bench.put(noise(torch.float32, (300, 1000)))
    bench.writer.flush()
    check_stored(ticket, noise(torch.float32, (300, 1000)))
    assert len(bench.names()) == 1


def test_flushing_nothing_writes_nothing(bench: Bench) -> None:
    bench.writer.flush()
    bench.put(torch.ones(3))
    bench.writer.flush()
    bench.writer.flush()
    assert bench.names() == ["0000.safetensors"]


def test_cancelled_tensors_are_not_written(bench: Bench) -> None:
    tickets = [bench.put(torch.full((64,), float(n)), name=f"t{n}") for n in range(4)]
    tickets[1].cancelled = tickets[3].cancelled = True
    bench.writer.flush()
    assert list(bench.shards[0].header.specs) == ["t0", "t2"]
    assert tickets[1].stored is tickets[3].stored is None
    check_stored(tickets[2], torch.full((64,), 2.0))


def test_if_all_are_cancelled_there_is_no_file(bench: Bench) -> None:
    bench.put(torch.ones(3)).cancelled = True
    bench.writer.flush()
    assert bench.names() == []


def test_names_that_clash_or_cannot_be_keys_are_kept_apart(bench: Bench) -> None:
    names = ["a", "a", "a#2", "__metadata__", f"{FILLER_PREFIX}1", f"{FILLER_PREFIX}3", "\ud800"]
    names += ["", "a", "\\ud800", "x" * 5000]
    tickets = [
        bench.put(torch.full((3,), n, dtype=torch.int8), name=name) for n, name in enumerate(names)
    ]
    bench.writer.flush()
    for number, ticket in enumerate(tickets):
        check_stored(ticket, torch.full((3,), number, dtype=torch.int8))
    assert bench.tensor_count() == len(names)
    assert {"a", "a#2", "a#2#2", "a#3"} <= bench.shards[0].header.specs.keys()


def test_a_listener_is_called_once(bench: Bench) -> None:
    calls: list[str] = []
    early = bench.put(torch.ones(3))
    early.notify(lambda: calls.append("early"))
    assert calls == []
    bench.writer.flush()
    early.notify(lambda: calls.append("late"))
    bench.writer.flush()
    assert calls == ["early", "late"]


def test_the_value_is_let_go_when_it_is_written(bench: Bench) -> None:
    tensor = torch.ones(1000)
    finished = threading.Event()
    storage = tensor.untyped_storage()
    ticket = bench.put(tensor)
    before = torch._C._storage_Use_Count(storage._cdata)
    ticket.notify(finished.set)
    bench.writer.flush()
    assert finished.is_set()
    del tensor
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) < before


# ------------------------------------------------------------------------ kinds of tensors


class Named(torch.Tensor):
    pass


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 7),
    "empty transposed": lambda: torch.empty(0, 7).t(),
    "transposed": lambda: noise(torch.bfloat16, (7, 9)).t(),
    "every other column": lambda: noise(torch.float32, (7, 10))[:, ::2],
    "channels last": lambda: noise(torch.float16, (2, 3, 4, 5)).to(
        memory_format=torch.channels_last
    ),
    "part of a larger one": lambda: noise(torch.int64, (10, 4))[3:5],
    "expanded": lambda: torch.arange(4.0).expand(3, 4),
    "expanded scalar": lambda: torch.tensor(2.0).expand(5),
    "overlapping windows": lambda: torch.arange(12.0).unfold(0, 4, 2),
    "conjugate": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "complex128": lambda: noise(torch.complex128, (3, 3)),
    "complex128 transposed": lambda: noise(torch.complex128, (3, 2)).t(),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3, 3)),
    "with a graph": lambda: torch.nn.Parameter(torch.randn(3, 3)) * 2,
    "subclass": lambda: torch.randn(5).as_subclass(Named),
    **{str(dtype): (lambda dtype=dtype: noise(dtype, (3, 5))) for dtype in STORABLE},  # type: ignore[misc]
}


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_comes_back(bench: Bench, kind: str, codec: str | None) -> None:
    tensor = KINDS[kind]()
    wanted = tensor.detach().clone()
    ticket = bench.put(tensor, codec)
    bench.writer.flush()
    check_stored(ticket, wanted)
    assert reference_accepts((bench.folder / bench.names()[0]).read_bytes())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_that_the_format_lacks_come_back(bench: Bench) -> None:
    dtypes = {
        one
        for name, one in vars(torch).items()
        if isinstance(one, torch.dtype) and "qint" not in name and "quint" not in name
    }
    others = sorted(dtypes - set(STORABLE), key=str)
    assert torch.complex128 in others
    tickets = [bench.put(noise(dtype, (8,)), name=str(dtype)) for dtype in others]
    bench.writer.flush()
    for dtype, ticket in zip(others, tickets, strict=True):
        check_stored(ticket, noise(dtype, (8,)))
        assert isinstance(ticket.stored, EncodedTensor)
        mapped = ticket.stored.mapped()
        assert mapped is not None
        assert mapped.data_ptr() % ALIGNMENT_BYTES == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized", "nested", "mkldnn"])
def test_what_is_more_than_its_elements_is_refused_at_once(bench: Bench, kind: str) -> None:
    tensor: torch.Tensor
    if kind == "sparse":
        tensor = torch.eye(3).to_sparse()
    elif kind == "meta":
        tensor = torch.empty(3, device="meta")
    elif kind == "quantized":
        tensor = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    elif kind == "nested":
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    elif torch.backends.mkldnn.is_available():
        tensor = torch.randn(3, 3).to_mkldnn()
    else:
        pytest.skip("this torch has no oneDNN")
    good = bench.put(torch.ones(3), name="good")
    with pytest.raises(UnsupportedTensorError, match="cannot store 'bad'"):
        bench.put(tensor, name="bad")
    bench.writer.flush()
    check_stored(good, torch.ones(3))
    assert list(bench.shards[0].header.specs) == ["good"]


def test_a_transposed_tensor_has_its_strides_again(bench: Bench) -> None:
    ticket = bench.put(torch.arange(12.0).reshape(3, 4).t())
    bench.writer.flush()
    assert isinstance(ticket.stored, StridedTensor)
    assert ticket.stored.load().stride() == (1, 4)


def test_everything_written_is_aligned(bench: Bench) -> None:
    sizes = [1, 3, 64, 65, 128, 7]
    tickets = [bench.put(noise(torch.uint8, (size,)), name=str(size)) for size in sizes]
    bench.writer.flush()
    for ticket in tickets:
        assert isinstance(ticket.stored, ShardTensor)
        assert ticket.stored.spec.offset % ALIGNMENT_BYTES == 0


# ---------------------------------------------------------------------------- compression


def test_what_compresses_is_packed_and_what_does_not_is_mapped(bench: Bench) -> None:
    plain, random = torch.arange(100_000) // 100, noise(torch.int64, (100_000,))
    soft, hard = bench.put(plain, "zstd"), bench.put(random, "zstd")
    bench.writer.flush()
    check_stored(soft, plain)
    check_stored(hard, random)
    assert isinstance(soft.stored, EncodedTensor)
    assert isinstance(hard.stored, ShardTensor)
    assert soft.stored.mapped() is None
    assert hard.stored.mapped() is not None
    assert bench.shards[0].header.file_bytes < random.nbytes * 1.2


def test_packed_tensors_of_several_chunks_and_strides(bench: Bench) -> None:
    value = (torch.arange(3_000_000, dtype=torch.int32) // 50).reshape(1000, 3000).t()
    ticket = bench.put(value, "zstd")
    bench.writer.flush()
    check_stored(ticket, value)
    assert isinstance(ticket.stored, StridedTensor)
    assert isinstance(ticket.stored.inner, EncodedTensor)
    assert ticket.stored.inner.chunk_count == 12
    assert ticket.stored.load().stride() == (1, 3000)


def test_one_group_is_packed_while_another_is_written(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    second, waited = threading.Event(), []

    def counted(data: memoryview, *rest: Any) -> Any:
        packed.append(len(data))
        if len(packed) == 2:
            second.set()
        return pack(data, *rest)

    class Slow(Files):
        def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
            waited.append(second.wait(timeout=20))
            super().write(fd, data, offset, path)

    monkeypatch.setattr(writer, "pack", counted)
    bench = make(group_bytes=2 * MIB, files=Slow())
    values = [torch.randn(MIB // 4) for _ in range(4)]
    tickets = [bench.put(value, codec="zstd", name=f"t{n}") for n, value in enumerate(values)]
    bench.writer.flush()
    assert waited
    assert all(waited)
    assert packed == [MIB] * 4
    for ticket, value in zip(tickets, values, strict=True):
        check_stored(ticket, value)
    assert len(bench.names()) == 4  # half a group each
