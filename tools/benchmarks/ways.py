"""How each library is made to hold a model: the only file here that calls them.

Peers are used as their own documentation and sources do it; they are imported where they are
needed, for they are optional and cost seconds.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diskoffload

from .checkpoints import Checkpoint, Spec, build, made

PLAIN = "plain module"
OURS = "diskoffload"
OURS_STREAMED = "diskoffload, mode=streamed"
OURS_BUDGET = "diskoffload, max_memory given"
OURS_REUSING = "diskoffload, mode=streamed, max_memory given"
OURS_WRITTEN = "diskoffload, offloaded from memory"
CT_CPU = "compressed-tensors CPUCache"
CT_DISK = "compressed-tensors DiskCache"
CT_DISK_WRITTEN = "compressed-tensors DiskCache, offloaded from memory"
ACCELERATE = "accelerate disk_offload"

NEEDS = {
    CT_CPU: ("compressed_tensors",),
    CT_DISK: ("compressed_tensors",),
    CT_DISK_WRITTEN: ("compressed_tensors",),
    ACCELERATE: ("accelerate",),
}
"""The peers that a way needs; none where it is not named."""

_OPENED_AS = {
    OURS_BUDGET: OURS,
    OURS_REUSING: OURS_STREAMED,
    OURS_WRITTEN: OURS,
    CT_CPU: CT_DISK,
    CT_DISK_WRITTEN: CT_DISK,
}


def can_stream() -> bool:
    """Tell whether this version of ours can read past the page cache."""
    return "mode" in inspect.signature(diskoffload.open_checkpoint).parameters


def variant(label: str) -> str:
    """Tell which of our ways it is, in few words."""
    return label.partition(", ")[2] or "default"


def open_as(
    label: str, checkpoint: Checkpoint, scratch: Path, budget_bytes: int | None = None
) -> torch.nn.Module:
    """Make a library hold the model of a checkpoint, without copying what lies on disk.

    Args:
        label: one of the above that works on a checkpoint.
        checkpoint: which.
        scratch: an empty folder for what the library writes beside it.
        budget_bytes: for those to which ``max_memory`` is given: what it may keep in memory.
    """
    return bind(label, checkpoint, build(checkpoint.spec), scratch, budget_bytes)


def bind(
    label: str,
    checkpoint: Checkpoint,
    model: torch.nn.Sequential,
    scratch: Path,
    budget_bytes: int | None = None,
) -> torch.nn.Module:
    """Bind a model on the meta device to its checkpoint, see :func:`open_as`."""
    if label in (OURS, OURS_STREAMED, OURS_BUDGET, OURS_REUSING):
        streams = label in (OURS_STREAMED, OURS_REUSING)
        options: dict[str, Any] = {"mode": "streamed"} if streams else {}
        if label in (OURS_BUDGET, OURS_REUSING):
            options["max_memory"] = budget_bytes
        return diskoffload.open_checkpoint(
            checkpoint.folder, model=model, offload_dir=scratch / "offload", **options
        )
    return _BINDERS[label](checkpoint, model, scratch)


def offload_from_memory(label: str, model: torch.nn.Module, scratch: Path) -> Callable[[], None]:
    """Make a library take a model from memory; give what waits until all is written."""
    names = [name for name, _ in model.named_modules()]
    if label.startswith(OURS):
        diskoffload.offload_model(model, "cpu", "disk", offload_dir=scratch / "offload")
        mappings: list[Any] = [module._parameters for module in model.modules()]
        # Any of them that has tensors will do: syncing one syncs the folder.
        cache: diskoffload.DiskCache = next(mapping for mapping in mappings if mapping)
        return cache.sync
    if label == ACCELERATE:
        importlib.import_module("accelerate").disk_offload(model, str(scratch / "offload"))
        return _nothing_to_wait_for
    (scratch / "offload").mkdir()
    waiting = "cpu" if label == CT_CPU else "disk"
    importlib.import_module("compressed_tensors.offload").dispatch_with_map(
        model,
        dict.fromkeys(names, ("cpu", waiting)),
        offload_dir=str(scratch / "offload"),
        show_progress=False,
    )
    return _nothing_to_wait_for


def dispatch(label: str, model: torch.nn.Module) -> None:
    """Dispatch a bound model by a map that leaves all of it on the disk.

    With the peers that is a part of binding.
    """
    if label.startswith(OURS):
        names = [name for name, _ in model.named_modules()]
        diskoffload.dispatch_with_map(
            model, dict.fromkeys(names, ("cpu", "disk")), show_progress=False
        )


def warm_up(label: str, scratch: str) -> None:
    """Run a tiny model once, so that no measurement has a first call's imports in it."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoint = made(Path(folder), Spec(2, 16))
        model = open_as(_OPENED_AS.get(label, label), checkpoint, Path(folder))
        with torch.no_grad():
            model(torch.ones(1, 16))
        del model
        gc.collect()


def _nothing_to_wait_for() -> None:
    """Return at once: the library wrote before it returned."""


def _bind_plain(
    checkpoint: Checkpoint, model: torch.nn.Sequential, scratch: Path
) -> torch.nn.Module:
    """Load all into memory, in copies that torch allocates as it does for any tensor."""
    del scratch
    load_file = importlib.import_module("safetensors.torch").load_file
    for path in checkpoint.files:
        loaded = {name: tensor.clone() for name, tensor in load_file(path).items()}
        model.load_state_dict(loaded, assign=True, strict=False)
    return model


def _bind_compressed_tensors(
    checkpoint: Checkpoint, model: torch.nn.Sequential, scratch: Path
) -> torch.nn.Module:
    """Link each tensor to its file, as the library does after ``from_pretrained``."""
    offload = importlib.import_module("compressed_tensors.offload")
    cache = importlib.import_module("compressed_tensors.offload.cache").DiskCache
    folder = scratch / "offload"
    folder.mkdir()
    files = checkpoint.file_of()
    for name, parameter in model.named_parameters():
        cache.create_checkpoint_symlink(parameter, _entry(name, parameter, files), str(folder))
    names = [name for name, _ in model.named_modules()]
    offload.dispatch_with_map(
        model,
        dict.fromkeys(names, ("cpu", "disk")),
        offload_dir=str(folder),
        show_progress=False,
    )
    return model


def _bind_accelerate(
    checkpoint: Checkpoint, model: torch.nn.Sequential, scratch: Path
) -> torch.nn.Module:
    """Give it an index of the tensors where they lie, as transformers writes it."""
    folder = scratch / "offload"
    folder.mkdir()
    files = checkpoint.file_of()
    index = {
        name: {**_entry(name, parameter, files), "shape": list(parameter.shape)}
        for name, parameter in model.named_parameters()
    }
    (folder / "index.json").write_text(json.dumps(index))
    held: torch.nn.Module = importlib.import_module("accelerate").disk_offload(
        model, str(folder), execution_device=torch.device("cpu")
    )
    return held


def _entry(name: str, parameter: torch.Tensor, files: dict[str, Path]) -> dict[str, Any]:
    return {
        "safetensors_file": str(files[name]),
        "weight_name": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


_BINDERS: dict[str, Callable[[Checkpoint, torch.nn.Sequential, Path], torch.nn.Module]] = {
    PLAIN: _bind_plain,
    CT_DISK: _bind_compressed_tensors,
    ACCELERATE: _bind_accelerate,
}
