"""Where the numbers come from: processor, memory, kernel, disk, and every version that counts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from . import host_memory, read_ahead

_PACKAGES = (
    "diskoffload",
    "torch",
    "safetensors",
    "numpy",
    "compressed-tensors",
    "accelerate",
    "transformers",
)
_ROOT = Path(__file__).resolve().parents[2]


def describe(work_dir: Path) -> dict[str, Any]:
    """Describe the machine, and the disk below a folder; what is not known is ``None``."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "processors_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "host_takes_back_free_memory": host_memory.is_taken_back(),
        "disk": _disk(work_dir),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def _disk(work_dir: Path) -> dict[str, Any]:
    queue = read_ahead.queue_of(work_dir)
    found: dict[str, Any] = {"file_system": _file_system(work_dir)}
    if queue is None:
        return {**found, "device": None}
    return {
        **found,
        "device": queue.parent.name,
        "model": _text(queue.parent / "device" / "model"),
        "rotational": _text(queue / "rotational") == "1",
        "scheduler": _chosen(queue / "scheduler"),
        "read_ahead_kib": read_ahead.read_kib(work_dir),
    }


def _file_system(path: Path) -> str | None:
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in (_text("/proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Name the commit that is measured, and say if the files differ from it."""
    git = ["git", "--no-optional-locks", "-C", str(_ROOT)]
    try:
        name = _said([*git, "rev-parse", "--short=12", "HEAD"])
        changed = _said([*git, "status", "--porcelain", "--", "diskoffload"])
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name} and changes" if changed else name


def _said(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def _field(path: str, name: str) -> str | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _chosen(path: str | Path) -> str | None:
    """Give the word in brackets, as sysfs marks the one that holds."""
    text = _text(path)
    return text.partition("[")[2].partition("]")[0] or text if text else None


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
