"""The journal: whole records, torn ones, damaged ones, and when it is written anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.journal import JOURNAL_NAME, Journal
from diskoffload.system.files import Files


def journal(folder: Path, files: Files | None = None) -> Journal:
    made = Journal(folder, files or Files())
    made.read()
    return made


def texts(folder: Path) -> list[str]:
    return [record["text"] for record in Journal(folder, Files()).read()]


def three(folder: Path) -> bytes:
    one = journal(folder)
    one.rewrite({"text": "first"})
    one.append({"text": "second"})
    one.append({"text": "third \0 é"})
    return (folder / JOURNAL_NAME).read_bytes()


def test_records_come_back_in_order(tmp_path: Path) -> None:
    assert journal(tmp_path).read() == []
    three(tmp_path)
    assert texts(tmp_path) == ["first", "second", "third \0 é"]
    again = journal(tmp_path)
    again.append({"text": "fourth"})
    assert texts(tmp_path)[3:] == ["fourth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL_NAME]


def test_a_record_cut_off_anywhere_was_never_written(tmp_path: Path) -> None:
    whole = three(tmp_path)
    # The last byte says nothing that the length before it does not.
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:length])
        assert len(texts(tmp_path)) == sum(end <= length for end in ends)
        # Blocks that never reached the device read as zeros.
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:length].ljust(len(whole) + 100, b"\0"))
        assert len(texts(tmp_path)) == sum(end <= length for end in ends)


def test_what_is_torn_is_never_appended_to(tmp_path: Path) -> None:
    whole = three(tmp_path)
    (tmp_path / JOURNAL_NAME).write_bytes(whole[:-5])
    again = journal(tmp_path)
    assert again.must_be_rewritten
    again.rewrite({"text": "all"})
    assert texts(tmp_path) == ["all"]


def test_a_wrong_byte_anywhere_is_damage_and_is_named(tmp_path: Path) -> None:
    whole = three(tmp_path)
    for place in range(len(whole)):
        for byte in (whole[place] ^ 1, whole[place] ^ 0x80, 0):
            changed = bytearray(whole)
            changed[place] = byte
            if place == len(whole) - 1 and not byte:
                continue  # as good as cut off
            (tmp_path / JOURNAL_NAME).write_bytes(changed)
            with pytest.raises(DamagedFileError, match=r"diskoffload.journal: record \d at offset"):
                texts(tmp_path)


@pytest.mark.parametrize("swapped", [[0, 2], [1, 2], [0, 2, 1], [0, 1, 1]])
def test_missing_and_repeated_records_are_damage(swapped: list[int], tmp_path: Path) -> None:
    lines = three(tmp_path).splitlines(keepends=True)
    (tmp_path / JOURNAL_NAME).write_bytes(b"".join(lines[number] for number in swapped))
    with pytest.raises(DamagedFileError, match="is not number"):
        texts(tmp_path)


def test_it_is_written_anew_when_most_of_it_is_dead(tmp_path: Path) -> None:
    one = journal(tmp_path)
    rewritten = longest = 0
    for number in range(2000):
        record = {"text": f"{number}", "padding": "x" * 1000}
        if one.must_be_rewritten:
            one.rewrite(record)
            rewritten += 1
        else:
            one.append(record)
        longest = max(longest, (tmp_path / JOURNAL_NAME).stat().st_size)
    assert texts(tmp_path)[-1] == "1999"
    assert longest < 100_000
    assert rewritten < 60


class NoSync(Files):
    """Every fsync of a file fails, as long as that is wanted."""

    broken = True

    def sync(self, fd: int, path: Path) -> None:
        if self.broken:
            raise StorageError(5, "could not sync the file", str(path))
        super().sync(fd, path)


def test_after_a_failed_fsync_the_file_is_not_appended_to(tmp_path: Path) -> None:
    before = three(tmp_path)
    files = NoSync()
    one = journal(tmp_path, files)
    with pytest.raises(StorageError, match="sync"):
        one.append({"text": "lost"})
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    assert one.must_be_rewritten
    with pytest.raises(StorageError, match="sync"):
        one.rewrite({"text": "lost too"})
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    files.broken = False
    one.rewrite({"text": "all"})
    one.append({"text": "more"})
    assert texts(tmp_path) == ["all", "more"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL_NAME]
