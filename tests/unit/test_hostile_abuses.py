"""The list of abuses names tests that exist, and every case that those tests have."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).parents[1] / "ABUSES.md"
# The rest of an entry: a case of the test that its section names, or a test by itself.
_REFERENCE = re.compile(r"`(test_\w+)\.py::(test_\w+)(?:\[([^`]+)\])?`")
_CASES_OF = re.compile(r"Cases of\s+" + _REFERENCE.pattern)

Test = tuple[str, str]


def rows() -> list[tuple[Test | None, str]]:
    """Give the last cell of every row, with the test that its section names."""
    found = []
    section: Test | None = None
    for paragraph in LIST.read_text(encoding="utf-8").split("\n\n"):
        if paragraph.startswith("## "):
            section = None
        named = _CASES_OF.search(paragraph)
        if named:
            section = (named[1], named[2])
        for line in paragraph.splitlines()[2:]:
            if line.startswith("|"):
                found.append((section, line.strip("| ").rsplit(" | ", 1)[-1]))
    return found


def listed() -> dict[Test, set[str]]:
    """Give every test that is named, and the cases of it that are."""
    found: dict[Test, set[str]] = {}
    for paragraph in _REFERENCE.finditer(LIST.read_text(encoding="utf-8")):
        cases = found.setdefault((paragraph[1], paragraph[2]), set())
        if paragraph[3]:
            cases.add(paragraph[3])
    for section, cell in rows():
        for name in re.findall(r"`([^`]+)`", _REFERENCE.sub("", cell)):
            assert section is not None, f"{name}: its section names no test"
            found[section].add(name)
    return found


def cases_of(test: Any) -> set[str]:
    """Give the names pytest gives to the cases of a test with one parameter."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    return {str(value) for mark in marks for value in mark.args[1]}


LISTED = listed()


@pytest.mark.parametrize("test", LISTED, ids="::".join)
def test_what_the_list_names_exists(test: Test) -> None:
    module, name = test
    found = getattr(importlib.import_module(module), name)
    assert LISTED[test] <= cases_of(found)


def test_every_case_of_a_section_is_listed() -> None:
    sections = {section for section, _ in rows() if section is not None}
    assert len(sections) >= 6
    for module, name in sections:
        cases = cases_of(getattr(importlib.import_module(module), name))
        assert cases == LISTED[module, name], (name, cases ^ LISTED[module, name])


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 60
    assert all("`" in cell for _, cell in rows())
