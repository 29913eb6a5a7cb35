"""The queue to disk: tensors are gathered into shards and written behind the producer's back.

A tensor waits in memory until its group is written, so what waits is bounded: while one
group is being written the next is gathered, and when that is full :meth:`Writer.put` waits.
Nothing is lost by a failed write: its tensors go back to the queue, the error surfaces at
the next call, and a later call tries again.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from diskoffload.errors import UnsupportedTensorError
from diskoffload.store.buffers import Buffers
from diskoffload.store.codec import codec_named, element_bytes_of
from diskoffload.store.encoded import ENCODING_KEY, EncodedTensor, encoding_of
from diskoffload.store.header import (
    ALIGNMENT_BYTES,
    DTYPE_NAMES,
    FILLER_PREFIX,
    METADATA_KEY,
    Planned,
    StoredSpec,
)
from diskoffload.store.packing import Packed, pack
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import ShardTensor, Stored, StridedTensor
from diskoffload.system.files import Files
from diskoffload.system.memory import (
    borrowed_bytes,
    elements_overlap,
    is_laid_plainly,
    tensor_bytes,
)

_GROUPS_ON_THEIR_WAY = 1
# Of what is packed, groups are half as large: one is packed while the one before is written.
_PACKED_GROUPS_ON_THEIR_WAY = 2
# Tensors larger than a group count as what they are: then one waits for the other.
_GROUPS_IN_MEMORY = 2
_FILLING = memoryview(bytes(ALIGNMENT_BYTES))


def digest_of(tensor: torch.Tensor) -> bytes:
    """Fingerprint a tensor's bytes with xxh3-128 (https://xxhash.com), row by row in order."""
    if is_laid_plainly(tensor):
        return xxhash.xxh3_128_digest(borrowed_bytes(tensor))
    return xxhash.xxh3_128_digest(tensor_bytes(_plain(tensor)))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


class Flushable(Protocol):
    """Where tickets go."""

    def flush(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Write all that is queued; see :meth:`Writer.flush`."""


@dataclass(eq=False)
class Ticket:
    """One tensor on its way to disk.

    Attributes:
        name: the name it should have in the file.
        tensor: the value; released when it is written. The writer reads it later, so a
            change made to it meanwhile may or may not be in what is stored: compare
            ``digest`` with the tensor's own before trusting ``stored``.
        codec: the way of compression to try, or ``None``.
        stored: the value on disk, once it is there.
        digest: of exactly the bytes that were stored.
        cancelled: whether its owner no longer wants the value stored.
        folder: where it is going; kept alive until it is there.
    """

    name: str
    tensor: torch.Tensor | None
    codec: str | None
    nbytes: int
    stored: Stored | None = None
    digest: bytes = b""
    cancelled: bool = False
    folder: Flushable | None = field(default=None, repr=False)
    _listener: Callable[[], None] | None = field(default=None, repr=False)

    def notify(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` once when the value is stored, from whatever thread that is in."""
        self._listener = listener
        if self.stored is not None:
            self._tell()

    def cancel(self) -> None:
        """Say that the value is no longer wanted."""
        self.cancelled = True
        self.folder = None

    def fulfil(self, stored: Stored) -> None:
        """Say that the value is on disk, and let go of it."""
        self.stored = stored
        self.tensor = None
        self.folder = None
        self._tell()

    def _tell(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener()


class Writer:
    """Writes tensors to shards from one thread of its own, and packs in another. Thread-safe."""

    def __init__(
        self,
        files: Files,
        next_path: Callable[[], Path],
        adopt: Callable[[Shard], None],
        group_bytes: int,
    ) -> None:
        """Start idle.

        Args:
            files: the file operations.
            next_path: gives an unused path for a new shard.
            adopt: takes charge of a shard just written (its life ends with its tensors).
            group_bytes: a shard is written when so much waits, or at :meth:`flush`.
        """
        self._files = files
        self._next_path = next_path
        self._adopt = adopt
        self._group_bytes = group_bytes
        self._lock = threading.RLock()
        self._group: list[Ticket] = []
        self._waiting_bytes = 0
        self._running_bytes = 0
        self._running: deque[tuple[list[Ticket], Future[None]]] = deque()
        self._group_is_packed = False
        self._spare = Buffers()
        self._executor: ThreadPoolExecutor | None = None
        self._packer: ThreadPoolExecutor | None = None
        self._thread_ids: set[int] = set()
        self.written_groups = 0
        self.written_bytes = 0

    def put(
        self, name: str, tensor: torch.Tensor, codec: str | None, folder: Flushable | None = None
    ) -> Ticket:
        """Queue a tensor; may wait for older ones.

        Raises:
            UnsupportedTensorError: a tensor that is more than its elements.
            StorageError: a write of older ones failed. They are queued again, this one is not.
        """
        _check_storable(name, tensor)
        nbytes = tensor.numel() * tensor.dtype.itemsize
        ticket = Ticket(name, tensor, codec, nbytes, folder=folder)
        with self._lock:
            # Not before the next one comes: until then a newer value may take its place.
            most = _PACKED_GROUPS_ON_THEIR_WAY if self._group_is_packed else _GROUPS_ON_THEIR_WAY
            enough_bytes = self._group_bytes // most
            starts = self._count_waiting(enough_bytes) >= enough_bytes
            while self._running and (
                self._running[0][1].done()
                or (starts and len(self._running) >= most)
                or self._waiting_bytes + self._running_bytes + nbytes
                > _GROUPS_IN_MEMORY * self._group_bytes
            ):
                self._finish_oldest()
            if starts:
                self._start_group()
            self._group.append(ticket)
            self._group_is_packed |= codec is not None
            self._waiting_bytes += nbytes
        return ticket

    def _count_waiting(self, enough_bytes: int) -> int:
        if self._waiting_bytes >= enough_bytes:
            self._group = [ticket for ticket in self._group if not ticket.cancelled]
            self._waiting_bytes = sum(ticket.nbytes for ticket in self._group)
        return self._waiting_bytes

    def flush(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Write all that waits and return when it is on disk.

        Args:
            meanwhile: called whenever some tensors were written and others are being written.

        Raises:
            StorageError: a write failed; its tensors are still queued.
        """
        with self._lock:
            self._start_group()
            while self._running:
                self._finish_oldest()
                if meanwhile is not None and self._running:
                    meanwhile()

    def close(self) -> None:
        """Drop what waits, let what runs end, and end the thread."""
        with self._lock:
            self._group.clear()
            # The collector may end us in our own thread, which cannot wait for itself.
            wait = threading.get_ident() not in self._thread_ids
            # What is being written waits for its packer, so that goes last.
            for executor in (self._executor, self._packer):
                if executor is not None:
                    executor.shutdown(wait=wait, cancel_futures=True)
            self._executor = self._packer = None
            self._running.clear()
            self._running_bytes = 0

    def _start_group(self) -> None:
        group = [ticket for ticket in self._group if not ticket.cancelled]
        self._group, self._waiting_bytes, self._group_is_packed = [], 0, False
        if not group:
            return
        self._running_bytes += sum(ticket.nbytes for ticket in group)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="diskoffload-writer")
        packing = None
        if any(ticket.codec is not None for ticket in group):
            if self._packer is None:
                self._packer = ThreadPoolExecutor(1, thread_name_prefix="diskoffload-packer")
            packing = self._packer.submit(self._prepare_all, group)
        self._running.append((group, self._executor.submit(self._write, group, packing)))

    def _finish_oldest(self) -> None:
        group, future = self._running[0]
        error = future.exception()  # an interrupt here leaves the group on its way
        self._running.popleft()
        self._running_bytes -= sum(ticket.nbytes for ticket in group)
        if error is not None:
            unwritten = [ticket for ticket in group if ticket.stored is None]
            self._group[:0] = unwritten
            self._group_is_packed |= any(ticket.codec is not None for ticket in unwritten)
            self._waiting_bytes += sum(ticket.nbytes for ticket in unwritten)
            try:
                raise error
            finally:  # else its own traceback keeps the error, and that the tensors
                del error, group, future, unwritten

    def _prepare_all(self, group: list[Ticket]) -> list[_Item]:
        self._thread_ids.add(threading.get_ident())
        return [_prepare(ticket, self._spare) for ticket in group]

    def _write(self, group: list[Ticket], packing: Future[list[_Item]] | None) -> None:
        self._thread_ids.add(threading.get_ident())
        items = self._prepare_all(group) if packing is None else packing.result()
        keys = _unique([ticket.name for ticket in group])
        encodings = {
            key: item.encoding for key, item in zip(keys, items, strict=True) if item.encoding
        }
        metadata = {ENCODING_KEY: json.dumps(encodings)} if encodings else {}
        planned: list[Planned] = [
            (key, item.dtype, item.shape) for key, item in zip(keys, items, strict=True)
        ]
        path = self._next_path()
        by_key = dict(zip(keys, items, strict=True))
        with ShardWriter(path, planned, self._files, metadata, fill=True) as writer:
            # One after the other as they lie in the file: they share steps then.
            for key, spec in writer.header.specs.items():
                item = by_key.get(key)
                if item is None:
                    writer.write(key, _FILLING[: spec.nbytes])
                    continue
                item.write(writer, key)
                item.release()
            writer.publish(durable=False)
        try:
            shard = Shard.just_published(writer, self._files)
            values = [
                item.stored_in(shard, shard.header.specs[key], writer.digests[key])
                for key, item in by_key.items()
            ]
        except BaseException:
            self._files.remove(path)  # nobody refers to it
            raise
        self._adopt(shard)
        for key, item, ticket, value in zip(keys, items, group, values, strict=True):
            ticket.digest = item.digest or bytes.fromhex(writer.digests[key])
            ticket.fulfil(value)
        self.written_groups += 1
        self.written_bytes += shard.header.file_bytes


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    """Refuse at once what the writer's thread could not write, or not completely."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a tensor that is not strided"
    elif tensor.is_meta:
        kind = "a meta tensor, which has no value"
    elif tensor.is_quantized:
        kind = "a quantized tensor, whose scale is no part of its bytes"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = f"a {type(tensor).__name__}, which wraps other tensors"
    else:
        return
    raise UnsupportedTensorError(
        f"cannot store {name!r}: it is {kind}; store plain tensors, or keep it in memory"
    )


def _unique(names: list[str]) -> list[str]:
    """Make keys of names: two models, or two values of one entry, may share a name."""
    taken = {METADATA_KEY}
    last: dict[str, int] = {}  # where to go on: thousands may be called "weight"
    keys = []
    for name in names:
        if not name.isascii():
            name = name.encode("utf-8", "backslashreplace").decode("utf-8")
        if name.startswith(FILLER_PREFIX):
            name = f"_{name}"
        key, number = name, last.get(name, 1)
        while key in taken:
            number += 1
            key = f"{name}#{number}"
        last[name] = number
        taken.add(key)
        keys.append(key)
    return keys


@dataclass
class _Item:
    """A tensor made ready for its file."""

    plain: torch.Tensor | None
    packed: Packed | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    encoding: dict[str, object] | None
    digest: bytes = b""  # of the value, where that is not what is written

    def write(self, writer: ShardWriter, key: str) -> None:
        if self.packed is not None:
            for chunk in self.packed.chunks:
                writer.write_part(key, chunk)
        elif self.plain is not None:
            writer.write(key, borrowed_bytes(self.plain))

    def stored_in(self, shard: Shard, spec: StoredSpec, digest: str) -> Stored:
        """Give the value as it is in its file."""
        value: Stored
        if self.encoding is None:
            value = ShardTensor(shard, spec, digest)
        else:
            value = EncodedTensor(shard, spec, self.encoding, digest)
        return value if self.strides is None else StridedTensor(value, self.strides)

    def release(self) -> None:
        if self.packed is not None:
            self.packed.release()


def _prepare(ticket: Ticket, spare: Buffers) -> _Item:
    tensor = ticket.tensor
    assert tensor is not None  # it is released only after it was written
    if ticket.codec is None and is_laid_plainly(tensor) and tensor.dtype in DTYPE_NAMES:
        return _Item(tensor, None, tensor.dtype, tuple(tensor.shape), None, None)
    # Where elements share memory (an expanded tensor), its strides cannot be written through.
    plainly_laid = tensor.is_contiguous() or elements_overlap(tensor)
    strides = None if plainly_laid else tuple(tensor.stride())
    plain = _plain(tensor)
    dtype, shape = plain.dtype, tuple(plain.shape)
    if ticket.codec is not None and ticket.nbytes:
        codec = codec_named(ticket.codec)
        packed = pack(tensor_bytes(plain), element_bytes_of(dtype), codec, spare)
        if packed is not None:
            encoding = encoding_of(dtype, shape, codec, [*map(len, packed.chunks)])
            place = (packed.nbytes,)
            return _Item(None, packed, torch.uint8, place, strides, encoding, packed.digest)
    if dtype in DTYPE_NAMES:
        return _Item(plain, None, dtype, shape, strides, None)
    encoding = encoding_of(dtype, shape)
    return _Item(plain, None, torch.uint8, (ticket.nbytes,), strides, encoding)
