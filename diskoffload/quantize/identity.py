"""What decides the bytes of a quantized checkpoint."""

from __future__ import annotations

from typing import Any

from diskoffload.checkpoint.fingerprint import fingerprint_of
from diskoffload.quantize.plan import Job
from diskoffload.resumable.differences import short


def identity_of(job: Job) -> dict[str, Any]:
    """Give all that decides the bytes of a result, as what :func:`json.dumps` takes.

    Where the source lies is no part of it: one that was moved, times and all, is the same.

    Raises:
        DamagedFileError: the source was changed since it was opened.
        StorageError: the source cannot be read.
    """
    plan = [
        [[file, key, str(dtype), list(shape)] for key, dtype, shape in planned]
        for file, planned in job.layout.files.items()
    ]
    dtypes = {name: str(dtype) for name, dtype in job.targets.dtypes.items()}
    return {
        "command": "quantize",
        "scheme": job.scheme.name,
        "dtype": job.plan.dtype,
        "ignored": dict.fromkeys(job.targets.ignore, True),
        "source": fingerprint_of(job.checkpoint),
        "config": {key: short(value) for key, value in job.checkpoint.config.items()},
        "files": len(job.layout.files),
        "plan": short([plan, job.outputs, list(job.targets.weights), dtypes]),
    }
