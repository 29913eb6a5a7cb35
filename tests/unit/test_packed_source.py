"""What a packed file says of the one it was made from is believed only as far as it can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from diskoffload.errors import DamagedFileError
from diskoffload.store.header import Header, build_header
from diskoffload.store.packed_source import SOURCE_KEY, source_as_text, source_of

DIGEST = "0123456789abcdef" * 2


def head() -> bytes:
    return build_header([("w", torch.float32, (4, 4))], {"format": "pt"})[0]


def said(**changed: Any) -> Header:
    """Give a header that says it, with something else in some places."""
    raw = head()
    content = json.loads(source_as_text(raw, len(raw) + 64, {"w": DIGEST}))
    content.update(changed)
    content = {key: value for key, value in content.items() if value != "absent"}
    return Header({}, 0, 0, {SOURCE_KEY: json.dumps(content)})


def test_what_was_said_is_read_again() -> None:
    found = source_of(said(), "x")
    assert found is not None
    assert found.head == head()
    assert found.digests == {"w": DIGEST}
    assert found.header.specs["w"].shape == (4, 4)
    assert source_of(Header({}, 0, 0, {}), "x") is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"version": 2}, "a newer diskoffload can unpack it"),
        ({"version": 0}, "says the version 0"),
        ({"version": True}, "says the version True"),
        ({"version": "absent"}, "says the version"),
        ({"bytes": "absent"}, "length, header or digests"),
        ({"bytes": -1}, "-1 bytes"),
        ({"bytes": 1 << 70}, "bytes"),
        ({"bytes": 12}, "what x was packed from"),
        ({"header": 7}, "length, header or digests"),
        ({"header": "{"}, "what x was packed from"),
        ({"header": "no json"}, "what x was packed from"),
        ({"digests": []}, "length, header or digests"),
        ({"digests": {}}, "digests of other tensors"),
        ({"digests": {"w": DIGEST, "v": DIGEST}}, "digests of other tensors"),
        ({"digests": {"w": DIGEST[1:]}}, "no digest for 'w'"),
        ({"digests": {"w": 3}}, "no digest for 'w'"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DamagedFileError, match=told):
        source_of(said(**changed), "x")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"version": 1} x', "null"])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(DamagedFileError):
        source_of(Header({}, 0, 0, {SOURCE_KEY: text}), "x")
