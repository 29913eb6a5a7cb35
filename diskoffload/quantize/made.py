"""A result that is there already: of the same job it is what was asked for."""

from __future__ import annotations

from pathlib import Path

from diskoffload.checkpoint.publish import RECORD_NAME, check_output
from diskoffload.errors import DamagedFileError, OutputExistsError
from diskoffload.quantize.identity import identity_of
from diskoffload.quantize.plan import Job
from diskoffload.quantize.state import SHARD_METADATA
from diskoffload.resumable.differences import differences
from diskoffload.resumable.note import NOTE_NAME, read_note
from diskoffload.store.shard_writer import left_of


def is_made(job: Job) -> bool:
    """Whether a job's result is there, whole by the headers and lengths of its files.

    Raises:
        OutputExistsError: another job's is, or a part of one; the message says what differs.
        StorageError: something cannot be read.
    """
    out = Path(job.plan.out)
    if (out / NOTE_NAME).exists() or not (out / RECORD_NAME).exists():
        return False
    try:
        record = read_note(out, job.files, RECORD_NAME)
    except DamagedFileError:
        record = None  # so that it is a folder like any other
    if record is None:
        check_output(out, overwrite=False)
        return False
    told = differences(record["job"], identity_of(job))
    if told:
        raise OutputExistsError(
            f"{out} holds the result of another job: {'; '.join(told)}. Name another result, or "
            "remove the folder"
        )
    lost = [
        file
        for file, planned in job.layout.files.items()
        if left_of(out / file, planned, job.files, SHARD_METADATA) != "published"
    ]
    if lost:
        raise OutputExistsError(
            f"{out} holds the result of this very job, but {', '.join(lost)} is gone or was "
            "changed; remove the folder to make it anew, or name another result"
        )
    return True
