"""Tests of what only Linux's own calls can do: left out where portable paths are taken."""

from __future__ import annotations

import pytest

from diskoffload.system.portable import IS_LINUX


def linux_only(lacking: str) -> pytest.MarkDecorator:
    """Mark a test that portable paths cannot pass, and say what they lack."""
    return pytest.mark.skipif(not IS_LINUX, reason=f"portable paths: {lacking}")
