"""What the crash matrix has found, each as small as it can be."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bare_net, held_by, hold, reopened
from recording import Watched, using

import diskoffload
from diskoffload.errors import StorageError
from diskoffload.store.commits import Commits, Committed
from diskoffload.store.folder import Folder
from diskoffload.store.journal import JOURNAL_NAME, NEW_SUFFIX, Journal


class Breaks(Watched):
    """Fails what it is told to, once or for as long as that is said."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: Callable[[str, str], BaseException | None] = lambda what, name: None

    def watch(
        self, what: str, path: Path, whole: Callable[[], Any], part: Callable[[], Any] | None = None
    ) -> Any:
        error = self.breaks(what, path.name)
        if error is not None:
            if part is not None:
                part()
            raise error
        return whole()

    def once(self, wanted: str, error: BaseException) -> None:
        """Fail the next operation of that name."""

        def breaks(what: str, name: str) -> BaseException | None:
            if what != wanted:
                return None
            self.breaks = lambda *_: None
            return error

        self.breaks = breaks


def commits(folder: Path, files: Watched) -> Commits:
    return Commits(Journal(folder, files))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError(5, "could not close")])
def test_a_commit_that_was_interrupted_when_it_was_durable(
    error: BaseException, root: Path
) -> None:
    """The record after it was told from a state that the journal no longer had."""
    files = Breaks()
    made = commits(root, files)
    made.write(Committed(note_text='"a"', entries={"x": {"at": None, "is": "buffer"}}))
    files.once("close", error)
    with pytest.raises(type(error)):
        made.write(Committed(note_text=json.dumps("b" * 500), entries={}))
    wanted = made.write(Committed(note_text='"a"', entries={"x": {"at": None, "is": "buffer"}}))
    assert commits(root, files).last == wanted


def test_a_commit_that_was_interrupted_when_its_record_was_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Watched()
    made = commits(root, files)
    made.write(Committed(note_text='"a"'))
    append = Journal.append

    def interrupted(journal: Journal, record: Any) -> None:
        append(journal, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.write(Committed(note_text='"b"'))
    monkeypatch.undo()
    wanted = made.write(Committed(note_text='"a"'))
    assert commits(root, files).last == wanted


def test_a_journal_whose_record_is_in_doubt_is_not_appended_to(root: Path) -> None:
    files = Breaks()
    journal = Journal(root, files)
    journal.read()
    journal.rewrite({})
    assert not journal.must_be_rewritten
    files.once("close", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        journal.append({})
    assert journal.must_be_rewritten


def test_a_journal_that_cannot_be_renamed_leaves_nothing(root: Path) -> None:
    files = Breaks()
    made = commits(root, files)
    files.once("rename", StorageError(5, "could not rename"))
    with pytest.raises(StorageError, match="rename"):
        made.write(Committed(note_text='"a"'))
    assert list(root.iterdir()) == []


def test_a_journal_that_was_begun_is_swept(root: Path) -> None:
    (root / (JOURNAL_NAME + NEW_SUFFIX)).write_bytes(b"begun")
    folder = Folder(root)
    assert [path.name for path in root.iterdir()] == ["diskoffload.lock"]
    folder.close()


def test_the_journal_is_durable_before_anything_is_swept(root: Path, checkpoint: Path) -> None:
    """Its last record may be one that no fsync followed, because a kill came first."""
    model = hold("mixed", root, checkpoint)
    diskoffload.commit(model)
    del model
    gc.collect()
    (root / "diskoffload-0123abcd-00001.safetensors").write_bytes(b"what an older record needs")
    done: list[tuple[str, str]] = []

    def note(what: str, name: str) -> None:
        done.append((what, name))

    files = Breaks()
    files.breaks = note
    Folder(root, files=files).close()
    removed = done.index(("remove", "diskoffload-0123abcd-00001.safetensors"))
    assert ("sync", JOURNAL_NAME) in done[:removed]
    assert ("sync_folder", root.name) in done[:removed]


def replaced(net: Any, value: float) -> None:
    for cell in (net.one, net.two, net.three):
        for key in ("w", "u"):
            setattr(cell, key, torch.nn.Parameter(torch.full((40, 40), value)))
        for key in ("s", "t"):
            setattr(cell, key, torch.full((40, 40), value))


def test_a_dead_file_that_cannot_be_removed_is_tried_again(root: Path, checkpoint: Path) -> None:
    """The commit was durable and said that it was not."""
    files = Breaks()
    with using(files):
        model = hold("mixed", root, checkpoint)
        diskoffload.commit(model)
        replaced(model, 1.0)
        gc.collect()
        files.breaks = lambda what, name: (
            StorageError(5, "could not remove") if what == "remove" and "0" in name else None
        )
        assert diskoffload.commit(model).number == 2
        before = len(list(root.glob("*.safetensors")))
        files.breaks = lambda *_: None
        replaced(model, 2.0)
        gc.collect()
        assert diskoffload.commit(model).number == 3
        assert len(list(root.glob("*.safetensors"))) < before
        del model
        gc.collect()


def test_a_file_that_cannot_be_mapped_is_not_left(root: Path) -> None:
    """Its finalizer was made only afterwards."""
    files = Breaks()
    folder = Folder(root, files=files)
    files.breaks = lambda what, name: MemoryError() if what == "map" else None
    with pytest.raises(MemoryError):
        folder.put("x", torch.ones(3), None)
        folder.flush()
    gc.collect()
    assert list(root.glob("*.safetensors")) == []
    files.breaks = lambda *_: None
    folder.close()


def test_a_file_lives_as_long_as_any_model_reads_it(root: Path, checkpoint: Path) -> None:
    """A second model had opened it once more, and the first one's finalizer removed it."""
    first = hold("built", root, checkpoint)
    diskoffload.commit(first)
    second = reopened("built", root)
    old: Any = second.one.w  # type: ignore[union-attr]
    replaced(second, 1.0)
    diskoffload.commit(second)
    del first
    gc.collect()
    second.one.w = old
    diskoffload.commit(second)
    wanted = held_by(second)
    del second, old
    gc.collect()
    assert held_by(reopened("built", root)).differs_from(wanted) == ""


def test_a_plain_tensor_that_went_and_came_back(root: Path, checkpoint: Path) -> None:
    """Where it had been was remembered, and gone."""
    model: Any = hold("mixed", root, checkpoint)
    diskoffload.commit(model)
    kept = {name: getattr(model.three, name) for name in ("w", "u", "s", "t")}
    replaced(model, 1.0)  # all that was in the file with them
    for name in kept:
        setattr(model.three, name, None)
    diskoffload.commit(model)
    for name, tensor in kept.items():
        setattr(model.three, name, tensor)
    diskoffload.commit(model)
    wanted = held_by(model)
    del model, tensor, kept
    gc.collect()
    assert held_by(reopened("mixed", root)).differs_from(wanted) == ""


def test_a_plain_tensor_edited_while_it_is_written(root: Path, checkpoint: Path) -> None:
    """Its older value was remembered as the one that is in the file."""
    files = Breaks()
    with using(files):
        model: Any = hold("mixed", root, checkpoint)
        weight = model.three.w
        before = weight.detach().clone()

        def edit(what: str, name: str) -> None:
            if what == "create" and name.endswith(".partial"):
                weight.data.fill_(5.0)

        diskoffload.commit(model)
        weight.data.fill_(4.0)
        before = weight.detach().clone()
        files.breaks = edit
        diskoffload.commit(model)
        files.breaks = lambda *_: None
        weight.data.copy_(before)
        diskoffload.commit(model)
        del model, weight
        gc.collect()
    found: Any = reopened("mixed", root)
    assert torch.equal(found.three.w, before)


def test_commits_of_two_threads_take_turns(
    root: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One had looked at the model earlier and was written later: the other's was undone."""
    model: Any = hold("mixed", root, checkpoint)
    diskoffload.commit(model)
    looked, go = threading.Event(), threading.Event()
    commit = Folder.commit

    def late(folder: Folder, *arguments: Any) -> Committed:
        if not looked.is_set():
            looked.set()
            assert not go.wait(0.5)  # the other waits for us
        return commit(folder, *arguments)

    def second() -> None:
        looked.wait()
        model.three.w.data.fill_(3.0)
        diskoffload.commit(model)
        go.set()

    monkeypatch.setattr(Folder, "commit", late)
    other = threading.Thread(target=second)
    other.start()
    diskoffload.commit(model)
    other.join()
    wanted = held_by(model)
    del model
    gc.collect()
    assert held_by(reopened("mixed", root)).differs_from(wanted) == ""


def test_what_is_frozen_stays_so(root: Path, checkpoint: Path) -> None:
    """Of an unchanged tensor of the checkpoint nothing was noted."""
    model: Any = hold("opened", root, checkpoint)
    model.one.w.requires_grad_(False)
    model.two.u.requires_grad_(False)
    diskoffload.commit(model)
    del model
    gc.collect()
    again = bare_net()
    again.three.w.requires_grad_(False)  # as a class may build it
    found: Any = diskoffload.reopen(root, model=again)
    assert not found.one.w.requires_grad
    assert not found.one.u.requires_grad
    assert found.one.u is found.two.u
    assert found.two.w.requires_grad
    assert found.three.w.requires_grad


def test_what_a_failed_commit_refers_to_stays_until_another_is_durable(
    root: Path, checkpoint: Path
) -> None:
    files = Breaks()
    place, copy = root / "offload", root / "copy"
    place.mkdir()
    with using(files):
        model: Any = hold("built", place, checkpoint)
        diskoffload.commit(model, "first")
        replaced(model, 2.0)
        files.breaks = lambda what, name: (
            StorageError(5, f"could not {what}")
            if name == JOURNAL_NAME and what in ("sync", "set_size")
            else None
        )
        with pytest.raises(StorageError, match="sync"):
            diskoffload.commit(model, "second")
        replaced(model, 3.0)
        model.one._parameters.sync()
        gc.collect()

        def killed(what: str, name: str) -> None:
            if what == "create" and name == JOURNAL_NAME + NEW_SUFFIX:
                shutil.copytree(place, copy)

        files.breaks = killed
        diskoffload.commit(model, "third")
        files.breaks = lambda *_: None
        del model
        gc.collect()
    found = reopened("built", copy)
    assert diskoffload.last_commit(found).note in ("first", "second")


def test_a_view_of_what_was_just_written_stays_one(root: Path, checkpoint: Path) -> None:
    model: Any = hold("built", root, checkpoint)
    model.one._parameters.sync()
    gc.collect()
    model.two.register_buffer("part", model.one.w.detach()[1:3])
    diskoffload.commit(model)
    wanted = held_by(model)
    del model
    gc.collect()
    assert held_by(reopened("built", root)).differs_from(wanted) == ""


@pytest.mark.parametrize("name", ["one.t", "two.u"])
def test_what_the_checkpoint_does_not_name_can_be_deleted(
    name: str, root: Path, checkpoint: Path
) -> None:
    model = hold("opened", root, checkpoint)
    part, key = name.split(".")
    delattr(model.get_submodule(part), key)
    diskoffload.commit(model)
    wanted = held_by(model)
    del model
    gc.collect()
    assert held_by(reopened("opened", root)).differs_from(wanted) == ""
