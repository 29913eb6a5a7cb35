"""Whether Linux's own calls are used; without them portable paths are taken, as on macOS.

That is decided here, once, when the package is imported, and the rooms beside this one ask
here before they touch what only Linux has. So the switch takes the very branches that
another system takes.
"""

from __future__ import annotations

import errno
import os
import sys
from types import ModuleType
from typing import Any

SWITCH = "DISKOFFLOAD_PORTABLE"
"""The environment variable that forces portable paths; empty and ``0`` do not."""

IS_LINUX = sys.platform == "linux" and os.environ.get(SWITCH, "") in ("", "0")
"""Whether Linux's own calls may be made."""


def of_linux(module: ModuleType, name: str) -> Any | None:
    """Give what a module has on Linux; ``None`` if it lacks it or portable paths are taken."""
    return getattr(module, name, None) if IS_LINUX else None


def proc(entry: str) -> str:
    """Name what lies beneath ``/proc``.

    Raises:
        FileNotFoundError: portable paths are taken: there is none.
    """
    if not IS_LINUX:
        reason = "not looked for: portable paths are taken"
        raise FileNotFoundError(errno.ENOENT, reason, f"/proc/{entry}")
    return f"/proc/{entry}"
