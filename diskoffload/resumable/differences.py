"""What of an unfinished result's job is different now, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import xxhash

_TIME = "mtime_ns"
_SOURCE_WORDS = {"bytes": "length", _TIME: "time of change", "sample": "data"}
_WORDS = {
    "command": "the command",
    "skipped": "the list of what is left as it is",
    "form": "the form of compressed bytes",
}
# What follows from the rest: told only where all before it is the same.
_DERIVED_WORDS = {
    "files": "the number of files (another max_shard_size?)",
    "plan": "the plan (another max_shard_size, or version of diskoffload, transformers or "
    "compressed-tensors?)",
}
_MOST_TOLD = 4
_LONGEST_VALUE = 60

_Keys = tuple[str, ...]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Tell in words what differs between two jobs' identities: what it is, then, and now.

    An identity is a table, of tables perhaps, of all that decides the bytes of a result, as
    :func:`json.dumps` takes it.
    """
    before, after = _leaves(old), _leaves(new)
    differing = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    if ("command",) in differing:
        differing = [("command",)]  # of another one, all the rest is as well
    own = [path for path in differing if path[0] not in _DERIVED_WORDS]
    told = [
        f"{_name(path)} was {_value(path, before)} and is {_value(path, after)}"
        for path in own or differing[:1]
    ]
    if len(told) > _MOST_TOLD:
        told[_MOST_TOLD:] = [f"{len(told) - _MOST_TOLD} more differences"]
    if own and all(path[-1] == _TIME for path in own):
        told.append("if only the time was changed, `touch -d 'THAT TIME' FILE` sets it back")
    return told


def _leaves(tree: Any, *path: str) -> dict[_Keys, Any]:
    """Lay a tree of tables flat."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name in tree for key, leaf in _leaves(tree[name], *path, name).items()}


def _name(path: _Keys) -> str:
    match path:
        case ("ignored", name):
            return f"{name!r} on the list of what is not quantized"
        case ("source", file, what):
            return f"the {_SOURCE_WORDS.get(what, what)} of the source's {file}"
        case ("config", key):
            return f"{key!r} in the source's config.json"
        case (first, *_):
            return {**_WORDS, **_DERIVED_WORDS}.get(first, first)
    raise AssertionError("an identity is a table")


def _value(path: _Keys, found: Mapping[_Keys, Any]) -> str:
    value = found.get(path)
    if path[0] == "ignored":
        return "there" if value else "not there"
    if path not in found:
        return "absent"
    if path[-1] == _TIME and isinstance(value, int):
        seconds, rest = divmod(value, 1_000_000_000)
        moment = datetime.fromtimestamp(seconds, timezone.utc)
        return f"{moment:%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
    return "as stored" if path == ("dtype",) and value is None else str(value)


def short(value: Any) -> str:
    """Give a value's JSON, or its digest where that is long."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"xxh3:{xxhash.xxh3_128_hexdigest(text.encode('ascii'))}"
