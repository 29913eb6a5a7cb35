"""What tells whether a checkpoint is still the one that a commit refers to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CommitError, listed
from diskoffload.store.shard import Shard

# A fine-tuned model has the size and the header of its base, and may have its time. So some
# bytes are compared too: enough that another model is noticed, few enough to cost nothing.
_SAMPLES = 32
_SAMPLE_BYTES = 4096


def fingerprint_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Take the fingerprint of every file: length, time, header and some blocks of the data.

    Raises:
        DamagedFileError: a file was changed since the checkpoint was opened.
        StorageError: a file cannot be read.
    """
    return {
        name: {
            "bytes": shard.header.file_bytes,
            "mtime_ns": shard.mtime_ns,
            "header": shard.header_digest,
            "sample": _sample(shard),
        }
        for name, shard in checkpoint.shards.items()
    }


def check_fingerprint(
    checkpoint: Checkpoint, expected: Mapping[str, Any], *, moved_from: Path | None = None
) -> None:
    """Refuse a checkpoint that is not the one whose fingerprint was taken.

    Args:
        checkpoint: what was found.
        expected: what :func:`fingerprint_of` gave once.
        moved_from: where it was then, if its user has named its place; times may differ then.

    Raises:
        CommitError: it differs; the message says in what.
    """
    found = fingerprint_of(checkpoint)
    faults = [f"{name} is new" for name in found if name not in expected]
    for name, before in expected.items():
        if name not in found:
            faults.append(f"{name} is gone")
            continue
        now = found[name]
        words = {"bytes": "length", "header": "header", "sample": "data"}
        if moved_from is None:
            words["mtime_ns"] = "time of change"
        differing = [word for key, word in words.items() if now[key] != before.get(key)]
        if differing:
            faults.append(f"{name} has another {' and '.join(differing)}")
    if faults:
        raise CommitError(
            f"{checkpoint.path} was changed or replaced since the commit: {listed(faults)}; what "
            "was committed belongs to the checkpoint as it was. If that lies elsewhere now, or "
            "only times were changed, name its place as source: then times may differ"
        )


def _sample(shard: Shard) -> str:
    digest = xxhash.xxh3_64()
    data_bytes = shard.header.file_bytes - shard.header.data_offset
    step = max(_SAMPLE_BYTES, data_bytes // _SAMPLES)
    for start in range(0, data_bytes, step):
        block = bytearray(min(_SAMPLE_BYTES, data_bytes - start))
        shard.read_at(shard.header.data_offset + start, memoryview(block))
        digest.update(block)
    return digest.hexdigest()
