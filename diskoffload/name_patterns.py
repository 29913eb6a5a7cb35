"""Names of modules and tensors as users give them: one, its end, or a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable

from diskoffload.errors import InvalidInputError

_PATTERN = "re:"


def name_matcher(entry: str, what: str) -> Callable[[str], object]:
    """Give what tells whether a name is meant by an entry.

    Args:
        entry: a name, whole or from a dot on to its end; or, after ``"re:"``, a regular
            expression that matches a name from its start.
        what: the list that the entry is of, for messages.

    Raises:
        InvalidInputError: the expression cannot be read.
    """
    if not entry.startswith(_PATTERN):
        return lambda name: name == entry or name.endswith(f".{entry}")
    try:
        return re.compile(entry.removeprefix(_PATTERN)).match
    except re.error as error:
        raise InvalidInputError(f"the {what} pattern {entry!r} cannot be read: {error}") from error
