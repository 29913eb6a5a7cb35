"""One file being written: it appears whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_files import (
    in_child,
    noise,
    open_shard,
    same,
)

from diskoffload.errors import DamagedFileError, InvalidInputError, NoSpaceError, StorageError
from diskoffload.store.digests import digests_of
from diskoffload.store.header import ALIGNMENT_BYTES
from diskoffload.store.shard_writer import ShardWriter, left_of
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes
from diskoffload.verifying import verify

pytestmark = pytest.mark.usefixtures("no_leaks")


PLAN = [("a", torch.float32, (40,)), ("b", torch.uint8, (64,)), ("e", torch.int8, (0,))]
VALUES = {"a": torch.arange(40.0), "b": torch.arange(64, dtype=torch.uint8)}


def begin(folder: Path, **options: bool) -> ShardWriter:
    return ShardWriter(folder / "out.safetensors", PLAN, Files(), {"k": "v"}, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_success_leaves_exactly_one_file(tmp_path: Path, durable: bool) -> None:
    with begin(tmp_path) as writer:
        assert names_in(tmp_path) == ["out.safetensors.partial"]
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        assert writer.publish(durable=durable) == tmp_path / "out.safetensors"
    assert names_in(tmp_path) == ["out.safetensors"]
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(same(loaded[name], value) for name, value in VALUES.items())
    assert loaded["e"].shape == (0,)


@pytest.mark.parametrize("with_error", [False, True])
def test_leaving_without_publishing_leaves_no_file(tmp_path: Path, with_error: bool) -> None:
    def use() -> None:
        with begin(tmp_path) as writer:
            writer.write("a", tensor_bytes(VALUES["a"]))
            if with_error:
                raise KeyboardInterrupt

    if with_error:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert names_in(tmp_path) == []


def test_publishing_refuses_what_was_never_written(tmp_path: Path) -> None:
    with begin(tmp_path) as writer:
        writer.write("b", tensor_bytes(VALUES["b"]))
        with pytest.raises(StorageError, match=r"1 of its tensors were not written, 'a'"):
            writer.publish()
    assert names_in(tmp_path) == []


def test_a_part_alone_does_not_complete_a_tensor(tmp_path: Path) -> None:
    with begin(tmp_path) as writer:
        writer.write("b", tensor_bytes(VALUES["b"]))
        writer.write_part("a", tensor_bytes(VALUES["a"])[:80])
        with pytest.raises(StorageError, match="'a'"):
            writer.publish()
        writer.write_part("a", tensor_bytes(VALUES["a"])[80:])
        writer.publish()
    assert same(load_file(tmp_path / "out.safetensors")["a"], VALUES["a"])


@pytest.mark.parametrize("nbytes", [0, 63, 65])
def test_a_value_of_another_length_is_refused(tmp_path: Path, nbytes: int) -> None:
    with begin(tmp_path) as writer, pytest.raises(StorageError, match="64 were planned"):
        writer.write("b", memoryview(bytes(nbytes)))


def test_a_name_that_is_taken_by_a_folder_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    with begin(tmp_path) as writer:
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        with pytest.raises(StorageError, match="rename"):
            writer.publish()
    assert names_in(tmp_path) == ["out.safetensors"]


def test_names_that_cannot_be_keys_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        ShardWriter(tmp_path / "out", [("__metadata__", torch.int8, (1,))], Files())
    assert names_in(tmp_path) == []


def test_a_second_writer_of_the_same_name_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with begin(tmp_path) as writer:
        with pytest.raises(StorageError, match="create"):
            begin(tmp_path)
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        writer.publish()
    assert names_in(tmp_path) == ["out.safetensors"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none"):
        begin(tmp_path / "none")


def limit_file_size(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, 1 << 20))


def write_beyond_the_limit(folder: Path, source: Path, how: str) -> list[object]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit_file_size(1 << 16 if how == "create" else 1 << 18)
    plan = [("a", torch.uint8, (1 << 17,))]
    try:
        with open(source, "rb") as file, ShardWriter(folder / "out", plan, Files()) as writer:
            limit_file_size(1 << 16)
            if how == "write":
                writer.write("a", memoryview(bytes(1 << 17)))
                writer.sync()  # until then it may wait
            else:
                writer.fill("a", lambda part, _: file.readinto(part))
                writer.sync()
        return ["no error"]
    except StorageError as error:
        return [error.errno, error.filename, names_in(folder)]


@pytest.mark.parametrize("how", ["create", "write", "fill"])
def test_a_write_error_leaves_no_file(tmp_path: Path, how: str) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_bytes(bytes(1 << 17))
    folder.mkdir()
    told = in_child(lambda: write_beyond_the_limit(folder, source, how))
    assert told == [errno.EFBIG, str(folder / "out.partial"), []]


def test_what_has_no_room_is_not_begun(small_disk: Path) -> None:
    items = [("a", torch.uint8, (8 << 20,))]
    with pytest.raises(NoSpaceError, match="are missing"):
        ShardWriter(small_disk / "out.safetensors", items, Files())
    assert names_in(small_disk) == []


def test_a_full_disk_is_named_and_leaves_no_file(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Files, "check_space", lambda *_: None)  # it was filled afterwards
    items = [("a", torch.uint8, (8 << 20,))]
    writer = ShardWriter(small_disk / "out.safetensors", items, Files())
    with pytest.raises(NoSpaceError, match="free some space") as caught, writer:
        writer.write("a", memoryview(bytes(8 << 20)))
    assert caught.value.filename == str(small_disk / "out.safetensors.partial")
    assert names_in(small_disk) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_users_umask_is_respected(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with begin(tmp_path) as writer:
            for name, value in VALUES.items():
                writer.write(name, tensor_bytes(value))
            writer.publish()
    finally:
        os.umask(before)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_filled_files_need_no_filler_written_and_align_everything(tmp_path: Path) -> None:
    items = [("a", torch.int8, (3,)), ("b", torch.int8, (5,)), ("c", torch.float32, (16,))]
    with ShardWriter(tmp_path / "out", items, Files(), fill=True) as writer:
        for name, _, shape in items:
            writer.write_part(
                name, memoryview(bytes([shape[0]] * writer.header.specs[name].nbytes))
            )
        writer.publish(durable=False)
    shard = open_shard(tmp_path / "out")
    for name, _, shape in items:
        tensor = shard.mapped(shard.header.specs[name])
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
        assert bytes(tensor_bytes(tensor)) == bytes([shape[0]] * tensor.nbytes)


# ---------------------------------------------------------------------------- copying


def test_copies_are_those_of_the_file_whatever_its_mapping_holds(tmp_path: Path) -> None:
    tensors = {"x": noise(torch.uint8, (9_000_001,)), "y": noise(torch.bfloat16, (999,))}
    save_file(tensors, tmp_path / "source.safetensors")
    source = open_shard(tmp_path / "source.safetensors")
    specs = source.header.specs
    source.mapped(specs["x"]).zero_()
    items = [(name, spec.dtype, spec.shape) for name, spec in specs.items()]
    with ShardWriter(tmp_path / "copy.safetensors", items, Files()) as writer:
        for name, spec in specs.items():
            source.copy_to(spec, writer, name)
        writer.publish()
    copied = load_file(tmp_path / "copy.safetensors")
    assert same(copied["x"], tensors["x"])
    assert same(copied["y"], tensors["y"])


class CountingFiles(Files):
    """Counts the writes."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        self.written.append((offset, len(data)))
        super().write(fd, data, offset, path)


def test_few_bytes_from_elsewhere_do_not_break_what_waits(tmp_path: Path) -> None:
    """A quantized weight is written in three parts, one of 16 bytes that lies far behind."""
    layers = 50
    plan, values = [], {}
    for number in range(layers):
        values[f"{number}.packed"] = noise(torch.int32, (64, 512))
        values[f"{number}.shape"] = torch.tensor([number, 64])
    plan = [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    files = CountingFiles()
    with ShardWriter(tmp_path / "out.safetensors", plan, files) as writer:
        for name, value in values.items():
            writer.write(name, tensor_bytes(value))
        writer.publish()
    assert len(files.written) <= 6  # the header twice, steps of 8 MiB, what was few at one stroke
    written = load_file(tmp_path / "out.safetensors")
    assert all(same(written[name], value) for name, value in values.items())
    shard = open_shard(tmp_path / "out.safetensors")
    digests = digests_of(shard.header, "it")
    for name, spec in shard.header.specs.items():
        shard.verify(spec, digests[name])


# --------------------------------------------------------------- suspended and resumed


def resume(
    folder: Path, finished: dict[str, str], plan: list[tuple[str, torch.dtype, tuple[int, ...]]]
) -> ShardWriter:
    return ShardWriter.resumed(
        folder / "out.safetensors", plan, Files(), {"k": "v"}, finished=finished
    )


def test_a_suspended_file_is_gone_on_with(tmp_path: Path) -> None:
    with begin(tmp_path) as writer:
        writer.write("a", tensor_bytes(VALUES["a"]))
        writer.suspend()
    assert names_in(tmp_path) == ["out.safetensors.partial"]
    with resume(tmp_path, {**writer.digests, "elsewhere": "0"}, PLAN) as writer:
        with pytest.raises(StorageError, match="'b'"):
            writer.publish()
        writer.write("b", tensor_bytes(VALUES["b"]))
        writer.publish()
    assert names_in(tmp_path) == ["out.safetensors"]
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(same(loaded[name], value) for name, value in VALUES.items())
    whole = tmp_path / "whole"
    whole.mkdir()
    with begin(whole) as writer:
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        writer.publish()
    written = [(folder / "out.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert written[0] == written[1]  # the digests as well


def test_a_file_killed_between_its_digests_and_its_name_is_gone_on_with(tmp_path: Path) -> None:
    with begin(tmp_path) as writer:
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        writer._complete()
        writer.suspend()
    path = tmp_path / "out.safetensors"
    assert left_of(path, PLAN, Files(), {"k": "v"}) == "begun"
    assert left_of(path, PLAN, Files(), {"k": "w"}) == "nothing"
    with resume(tmp_path, writer.digests, PLAN) as writer:
        writer.publish()
    assert left_of(path, PLAN, Files(), {"k": "v"}) == "published"
    assert verify(path).faults == []


def test_with_nothing_finished_a_left_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors.partial").write_bytes(b"what a killed process left")
    with resume(tmp_path, {}, PLAN) as writer:
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        writer.publish()
    assert load_file(tmp_path / "out.safetensors").keys() == {"a", "b", "e"}


@pytest.mark.parametrize("fault", ["missing", "shorter", "other plan"])
def test_a_file_that_is_not_the_one_begun_is_refused_and_left(tmp_path: Path, fault: str) -> None:
    with begin(tmp_path) as writer:
        writer.write("a", tensor_bytes(VALUES["a"]))
        writer.suspend()
    left = tmp_path / "out.safetensors.partial"
    plan = [*PLAN[:1], ("c", torch.uint8, (64,)), PLAN[2]] if fault == "other plan" else PLAN
    if fault == "missing":
        left.unlink()
    elif fault == "shorter":
        os.truncate(left, left.stat().st_size - 1)
    with pytest.raises(DamagedFileError, match="begin anew"):
        resume(tmp_path, {"a": "0" * 32}, plan)
    assert left.exists() == (fault != "missing")
