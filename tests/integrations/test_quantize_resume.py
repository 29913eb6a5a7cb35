"""Going on with an unfinished result: only with what it was begun with, and only what is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import digests
from quantize_bench import MAX_SHARD_BYTES, Bench, make_bench, noted

from diskoffload.errors import (
    DamagedFileError,
    FolderInUseError,
    OutputExistsError,
)
from diskoffload.quantize import Interrupted, quantize_checkpoint, state
from diskoffload.quantize.plan import prepare
from diskoffload.resumable import claim
from diskoffload.resumable.lock import LOCK_NAME
from diskoffload.resumable.note import NEW_NOTE_NAME, NOTE_NAME
from diskoffload.system.files import Files

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def planned(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(checkpoints["qwen3-tied"], tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(planned: Bench) -> Iterator[Bench]:
    yield planned
    planned.clear()


def stop_after(count: int) -> Callable[[], bool]:
    answers = [False] * count + [True]
    return lambda: answers.pop(0)


def interrupt(bench: Bench, count: int = 12) -> dict[str, str]:
    """Leave a result with so many tensors done; give what lies in its folder."""
    with pytest.raises(Interrupted):
        bench.work(stop=stop_after(count))
    assert noted(bench.partial) == count
    return digests(bench.partial)


# ------------------------------------------------------------------------ another job


OTHER_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "FP8"}, "scheme was W4A16 and is FP8"),
    ({"dtype": "float16"}, "dtype was as stored and is float16"),
    (
        {"ignore": ["lm_head", "re:.*layers.1.mlp.up.*"]},
        "'model.layers.1.mlp.up_proj' on the list of what is not quantized was not there and "
        "is there",
    ),
    ({"max_shard_size": "1GB"}, r"files \(another max_shard_size\?\) was 3 and is 1"),
]


def test_another_job_is_refused_and_named(bench: Bench) -> None:
    before = interrupt(bench)
    source = bench.job.checkpoint.path
    usual: dict[str, Any] = {"scheme": "W4A16", "max_shard_size": MAX_SHARD_BYTES}
    for changed, told in OTHER_JOBS:
        with pytest.raises(OutputExistsError, match=told) as caught:
            quantize_checkpoint(source, bench.out, **{**usual, **changed})
        assert str(caught.value).count(" was ") <= 4
        assert digests(bench.partial) == before
    quantize_checkpoint(source, bench.out, **usual, ignore=["re:lm_head"])  # says the same
    bench.check()


def change_weights(source: Path) -> str:
    """Replace a shard by another model's: the same length, time and header."""
    file = source / "model-00002-of-00003.safetensors"
    content, status = bytearray(file.read_bytes()), file.stat()
    data = 8 + int.from_bytes(content[:8], "little")
    content[data:] = bytes(one ^ 1 for one in content[data:])
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return r"^\S+ holds the unfinished result of another job: the data of the source's model-00002"


def touch(source: Path) -> str:
    file = source / "model-00001-of-00003.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    return (
        r"the time of change of the source's model-00001-of-00003.safetensors was "
        r"20[-\d]+ [\d:.]+ UTC and is 20[-\d]+ [\d:.]+ UTC; if only the time was changed, `touch -d"
    )


def change_config(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (source / "config.json").write_text(json.dumps(config))
    return "'rms_norm_eps' in the source's config.json was 1e-06 and is 0.5"


def change_length(source: Path) -> str:
    file = source / "model-00003-of-00003.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    longer = (size + 64).to_bytes(8, "little") + content[8 : 8 + size] + b" " * 64
    file.write_bytes(longer + content[8 + size :])
    return rf"the length of the source's {file.name} was {len(content)} and is {len(content) + 64}"


def test_another_source_is_refused_and_named(bench: Bench, tmp_path: Path) -> None:
    before = interrupt(bench)
    for change in (change_weights, touch, change_config, change_length):
        source = tmp_path / change.__name__
        shutil.copytree(bench.job.checkpoint.path, source)
        told = change(source)
        with pytest.raises(OutputExistsError, match=told):
            quantize_checkpoint(source, bench.out, "W4A16", max_shard_size=MAX_SHARD_BYTES)
        assert digests(bench.partial) == before


def test_a_source_that_was_moved_is_the_same(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diskoffload")
    interrupt(bench)
    (tmp_path / "blobs").mkdir()
    shutil.copytree(bench.job.checkpoint.path, tmp_path / "moved")  # times are kept
    for file in list((tmp_path / "moved").glob("*.safetensors")):  # as in a hub's cache
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    result = quantize_checkpoint(
        tmp_path / "moved", bench.out, "W4A16", max_shard_size=MAX_SHARD_BYTES
    )
    assert result.resumed == 12
    assert f"and is {tmp_path / 'moved'}: length, time and header" in caplog.text
    bench.check()


# ------------------------------------------------------------------- another process


def test_a_second_process_is_refused_and_a_dead_ones_lock_taken(bench: Bench) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        answers = iter(range(5))

        def stop() -> bool:
            if next(answers, None) is None:
                os.write(writer, b"!")
                signal.pause()
            return False

        torch.set_num_threads(1)
        claim.NOTE_EVERY_BYTES = 1
        bench.work(stop=stop)
        os._exit(1)
    try:
        assert os.read(reader, 1) == b"!"
        before = digests(bench.partial)
        with pytest.raises(FolderInUseError, match=rf"process \(pid {pid}\);.*another result"):
            bench.work()
        assert digests(bench.partial) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert (bench.partial / LOCK_NAME).exists()
    assert bench.work().resumed == 5
    bench.check()


def test_the_lock_goes_with_an_error_too(bench: Bench) -> None:
    interrupt(bench)
    assert not (bench.partial / LOCK_NAME).exists()
    (bench.partial / NOTE_NAME).write_text("")
    with pytest.raises(DamagedFileError):
        bench.work()
    assert not (bench.partial / LOCK_NAME).exists()


# ------------------------------------------------------------------------ damaged notes


DAMAGES: list[Callable[[bytes], bytes]] = [
    *(lambda text, n=n: text[: len(text) * n // 5] for n in range(5)),  # type: ignore[misc]
    lambda text: b"\0" * len(text),
    lambda text: text[:100] + b"\xff" + text[101:],
    lambda text: b"[" * 100_000,
    lambda text: b"[1, 2]",
    lambda text: b'{"note": {"done": 24}}',
    lambda text: text.replace(b'"format": 2', b'"format": 3'),
    lambda text: text.replace(b'"done": 12', b'"done": 22'),
]


def test_a_damaged_note_is_never_trusted(bench: Bench) -> None:
    interrupt(bench)
    note = bench.partial / NOTE_NAME
    whole = note.read_bytes()
    for damage in DAMAGES:
        assert damage(whole) != whole
        note.write_bytes(damage(whole))
        before = digests(bench.partial)
        with pytest.raises(DamagedFileError, match="remove the folder to begin anew"):
            bench.work()
        assert digests(bench.partial) == before
    note.write_bytes(whole)
    assert bench.work().resumed == 12
    bench.check()


def test_a_folder_of_others_is_left_alone(bench: Bench) -> None:
    bench.partial.mkdir()
    (bench.partial / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"it holds thesis.tex without a note"):
        bench.work()
    assert list(digests(bench.root)) == ["out.partial/thesis.tex"]
    (bench.partial / "thesis.tex").unlink()
    (bench.partial / NEW_NOTE_NAME).write_text("{")  # killed before there was a note
    (bench.partial / LOCK_NAME).touch()
    assert bench.work().resumed == 0
    bench.check()


# ------------------------------------------------------------- files that changed later


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def exchange_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"?")


@pytest.mark.parametrize(
    ("which", "harm"),
    [
        ("model-00001-of-00003.safetensors", cut),
        ("model-00001-of-00003.safetensors", exchange_header),
        ("*.partial", cut),
        ("*.partial", lengthen),
        ("*.partial", Path.unlink),
    ],
)
def test_a_file_that_is_not_as_noted_is_written_again(
    bench: Bench, which: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(bench, 15)
    (path,) = bench.partial.glob(which)
    harm(path)
    assert 0 < bench.work().resumed < 15
    assert f"{path.name.removesuffix('.partial')} is gone or was cut off" in caplog.text
    bench.check()


def test_stopped_again_before_the_open_file_was_reached(bench: Bench) -> None:
    interrupt(bench, 15)
    cut(bench.partial / "model-00001-of-00003.safetensors")
    with pytest.raises(Interrupted):
        bench.work(stop=stop_after(2))
    assert noted(bench.partial) == 2
    assert list(bench.partial.glob("model-00003*.partial"))
    bench.work()
    bench.check()


# ------------------------------------------------------------------------ what it costs


class Counting(Files):
    """Tells the size of every note."""

    def __init__(self) -> None:
        self.notes: list[int] = []

    def rename(self, source: Path, target: Path) -> None:
        if source.name == NEW_NOTE_NAME:
            self.notes.append(source.stat().st_size)
        super().rename(source, target)


def test_notes_are_few_and_small(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes() -> list[int]:
        files = Counting()
        bench.work(files)
        bench.check()
        return files.notes

    assert len(notes()) == 1  # less than 256 MiB, and less than 30 seconds
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 50_000)
    assert len(notes()) == 1 + bench.job.plan.written_bytes // 50_000 - 1
    monkeypatch.setattr(claim, "NOTE_EVERY_SECONDS", 0)
    sizes = notes()
    assert len(sizes) == 1 + len(bench.job.outputs)
    # Of what is done it says one number, and digests of one file's tensors: the open one's.
    most = max(map(len, bench.job.layout.files.values()))
    assert max(sizes) - min(sizes) <= most * 100
    shards = len(bench.job.checkpoint.shards)
    assert min(sizes) < 2000 + 300 * shards


def test_one_note_is_enough_for_any_number_of_files(checkpoints: dict[str, Path]) -> None:
    """Files that were finished are known by themselves."""
    source = checkpoints["llama"]
    job = prepare(source, source.parent / "nowhere", "W8A16", ["lm_head"], None, "50KB")
    assert len(job.layout.files) > 5
    assert sys.getsizeof(json.dumps(state.identity_of(job))) < 8000
