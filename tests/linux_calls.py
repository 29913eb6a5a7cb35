"""A plugin of pytest: whoever of the library asks for what only Linux has, fails the run.

Python tells of files that are opened and of C functions that are looked up
(https://docs.python.org/3/library/audit_events.html); calls of :mod:`os` are watched themselves.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import pytest

import diskoffload

_PACKAGE = os.path.dirname(diskoffload.__file__)
_CALLS = ("posix_fadvise",)
_LIBRARY_CALLS = ("renameat2", "malloc_trim")
# Nothing is decided by it: anonymous_bytes_of_process reports it.
_GAUGE = "/proc/self/status"

asked: list[str] = []


def _asker() -> str:
    """Name the line of ours that led here, if it is one of ours and not of a test or psutil."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "pathlib" in frame.f_code.co_filename:
        frame = frame.f_back
    file = "" if frame is None else frame.f_code.co_filename
    return f"{file}:{frame.f_lineno}" if frame is not None and file.startswith(_PACKAGE) else ""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        name = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        of_linux = name.startswith(("/proc", "/sys")) and name != _GAUGE
        of_linux |= isinstance(flags, int) and bool(flags & os.O_DIRECT)
        if of_linux and _asker():
            asked.append(f"open {name} with flags {flags:#o}, {_asker()}")
    elif event == "ctypes.dlsym" and arguments[1] in _LIBRARY_CALLS and _asker():
        asked.append(f"{arguments[1]}, {_asker()}")


def _watched(name: str) -> Any:
    real = getattr(os, name)

    def call(*arguments: Any) -> Any:
        if _asker():
            asked.append(f"os.{name}, {_asker()}")
        return real(*arguments)

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    for name in _CALLS:
        setattr(os, name, _watched(name))
    sys.addaudithook(_note)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if asked:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for one in sorted(set(asked)):
        terminalreporter.write_line(f"asked of Linux: {one}")
    terminalreporter.write_line(f"asked of Linux: {len(asked)} times")
