"""The commands that compress a checkpoint and give it back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.cli_stop import stop_on_interrupt
from diskoffload.errors import InvalidInputError
from diskoffload.name_patterns import name_matcher
from diskoffload.packing import pack_checkpoint, plan_packing, plan_unpacking, unpack_checkpoint
from diskoffload.store.compression import Compression, Layout

_GOES_ON = (
    "All that is written is read back and compared before OUT appears. Stopped with Ctrl-C, a "
    "kill or a power cut, the same command goes on, from at most 256 MiB or 30 seconds before."
)


def add_packing_commands(commands: Any) -> None:
    """Add them to the parser's commands."""
    _add_pack(commands)
    _add_unpack(commands)


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser(
        "pack",
        help="compress a checkpoint without loss",
        description="Compress a checkpoint without loss, to a folder that opens as it does, with "
        "diskoffload alone. Tensors that would not save a tenth are stored as they are. "
        + _GOES_ON,
    )
    pack.add_argument("source", metavar="SRC", help="the checkpoint's folder or file; only read")
    pack.add_argument("out", metavar="OUT", help="the result's folder; must not exist yet")
    for option, help_text in (
        (
            "--only",
            "pack only these tensors: a name, its end from a dot on, or re:PATTERN",
        ),
        ("--skip", "leave these tensors as they are"),
    ):
        pack.add_argument(
            option,
            action="append",
            default=[],
            metavar="NAME",
            help=f"{help_text}; may be given several times",
        )
    pack.add_argument(
        "--if-it-pays",
        action="store_true",
        help="measure OUT's disk and the decoder first, and do nothing unless weights would be "
        "read sooner",
    )
    pack.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    pack.add_argument("--json", action="store_true", help="print the result as JSON")
    pack.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> int:
    way = "auto" if options.if_it_pays else "zstd"
    compression = _chosen(options.only, options.skip, way)
    if options.dry_run:
        plan = plan_packing(options.source, options.out, compression=compression)
        print(json.dumps(plan.as_json(), indent=1) if options.json else plan)
        return 0
    began_seconds = time.monotonic()
    with stop_on_interrupt("tensor") as stop:
        result = pack_checkpoint(
            options.source,
            options.out,
            compression=compression,
            show_progress=not options.json and sys.stderr.isatty(),
            stop=stop,
        )
    seconds = time.monotonic() - began_seconds
    if options.json:
        done = {"packed": result.packed, "written_bytes": result.written_bytes}
        measured = {"seconds": seconds, "resumed": result.resumed, "was_packed": bool(result.out)}
        print(json.dumps({**result.plan.as_json(), **done, **measured}, indent=1))
    elif result.out is None:
        print(f"not packed, because it does not pay: {result.plan.reason}")
    else:
        total = len(result.plan.packed) + len(result.plan.skipped)
        print(
            f"{result.packed} of {total} tensors packed; {format_bytes(result.plan.read_bytes)} -> "
            f"{format_bytes(result.written_bytes)} in {seconds:.1f} s, read back and compared; "
            f"{result.out}"
        )
        _tell_of_resumed(result.resumed)
    return 0


def _chosen(only: Sequence[str], skip: Sequence[str], way: str) -> Compression:
    """Give what pack takes as compression; patterns choose among names."""
    if not only and not skip:
        return way
    if way == "auto":
        raise InvalidInputError(
            "--if-it-pays is for a whole checkpoint: leave it out, or --only and --skip"
        )
    wanted = [name_matcher(one, "--only") for one in only]
    unwanted = [name_matcher(one, "--skip") for one in skip]

    def choose(name: str, tensor: Layout) -> bool:
        is_wanted = not wanted or any(fits(name) for fits in wanted)
        return is_wanted and not any(fits(name) for fits in unwanted)

    return choose


def _add_unpack(commands: Any) -> None:
    unpack = commands.add_parser(
        "unpack",
        help="give back what was packed, byte for byte",
        description="Write the files again that a packed checkpoint was made from, byte for byte. "
        + _GOES_ON,
    )
    unpack.add_argument("source", metavar="SRC", help="the packed folder or file; only read")
    unpack.add_argument("out", metavar="OUT", help="the result's folder; must not exist yet")
    unpack.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    unpack.add_argument("--json", action="store_true", help="print the result as JSON")
    unpack.set_defaults(run=_unpack)


def _unpack(options: argparse.Namespace) -> int:
    if options.dry_run:
        plan = plan_unpacking(options.source, options.out)
        print(json.dumps(plan.as_json(), indent=1) if options.json else plan)
        return 0
    began_seconds = time.monotonic()
    with stop_on_interrupt("tensor") as stop:
        result = unpack_checkpoint(
            options.source,
            options.out,
            show_progress=not options.json and sys.stderr.isatty(),
            stop=stop,
        )
    seconds = time.monotonic() - began_seconds
    if options.json:
        measured = {"seconds": seconds, "resumed": result.resumed}
        print(json.dumps({**result.plan.as_json(), **measured}, indent=1))
        return 0
    print(
        f"{format_bytes(result.plan.read_bytes)} -> {format_bytes(result.plan.written_bytes)} in "
        f"{seconds:.1f} s, read back and compared; {result.out}"
    )
    _tell_of_resumed(result.resumed)
    return 0


def _tell_of_resumed(count: int) -> None:
    if count:
        print(f"{count} tensors were done by an earlier run")
