"""The checkpoint that is pressed into a small memory; written once for all tests here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from sealed import CHECKPOINT_BYTES, LIMIT_BYTES, Sealed, fingerprint
from write_checkpoint import write_checkpoint

from diskoffload.system.files import free_bytes, memory_file_system


@pytest.fixture(scope="session")
def large_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, cgroup_refusal: str | None
) -> Iterator[Sealed]:
    """A Llama-style bf16 checkpoint of more than twice ``LIMIT_BYTES``."""
    if cgroup_refusal is not None:
        pytest.skip(f"no memory control group here: {cgroup_refusal}")
    folder = tmp_path_factory.mktemp("large")
    if memory_file_system(folder):
        pytest.skip(f"{folder} is on a file system in memory; point --basetemp at a disk")
    if free_bytes(folder) < 3 * CHECKPOINT_BYTES:
        pytest.skip(f"{folder} has too little room for a large checkpoint and its copy")
    path = folder / "checkpoint"
    write_checkpoint(path, CHECKPOINT_BYTES)
    size_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size_bytes > 2 * LIMIT_BYTES
    yield Sealed(path, size_bytes, fingerprint(path))
    shutil.rmtree(folder)
