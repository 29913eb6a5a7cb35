"""The commands that look at, check and tidy up a folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.errors import CommitError
from diskoffload.inspect import inspect_path
from diskoffload.store.commits import Commits
from diskoffload.store.compaction import compact_folder, planned_compaction
from diskoffload.store.folder import Folder
from diskoffload.store.journal import JOURNAL_NAME, Journal
from diskoffload.store.sweeping import sweep
from diskoffload.system.files import Files
from diskoffload.verifying import verify


def add_folder_commands(commands: Any) -> None:
    """Add them to the parser's commands."""
    _add_inspect(commands)
    _add_verify(commands)
    _add_sweep(commands)
    _add_compact(commands)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="list the shards and tensors of a folder or file",
        description="List the safetensors shards of an offload folder, a checkpoint or one file.",
    )
    inspect.add_argument("path", metavar="PATH", help="a folder or a safetensors file")
    inspect.add_argument("--shards", action="store_true", help="list shards without their tensors")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    found = inspect_path(options.path)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        print(found.as_table(only_shards=options.shards))
    return 1 if any(shard.fault for shard in found.shards) else 0


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare what lies on disk with the checksums written with it",
        description="Check every header, and read every tensor that has a checksum. Of an offload "
        "folder the journal, the committed files and the source's fingerprint too. Exit status 1 "
        "if something is not as it was written.",
    )
    parser.add_argument("path", metavar="PATH", help="a folder or a safetensors file; only read")
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="where the checkpoint is that an offload folder's commit belongs to, if it was moved",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    show_progress = not options.json and sys.stderr.isatty()
    found = verify(options.path, source=options.source, show_progress=show_progress)
    print(json.dumps(found.as_json(), indent=1) if options.json else found)
    return 1 if found.faults else 0


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="remove what processes that died have left in a folder",
        description="Remove scratch files that no process uses and no commit refers to, in an "
        "offload folder or in the temporary ones inside PATH (/tmp), and results there that a "
        "killed process had begun to save. Files of others stay.",
    )
    parser.add_argument("path", metavar="PATH", help="a folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    found = sweep(options.path, dry_run=options.dry_run)
    if options.json:
        print(json.dumps([{"path": str(one.path), "bytes": one.nbytes} for one in found], indent=1))
        return 0
    for one in found:
        print(f"{format_bytes(one.nbytes):>10}  {one.path}")
    total = format_bytes(sum(one.nbytes for one in found))
    print(f"{len(found)} files, {total}: {'would be' if options.dry_run else 'were'} removed")
    return 0


def _add_compact(commands: Any) -> None:
    parser = commands.add_parser(
        "compact",
        help="give back the space of committed files that are mostly dead",
        description="Write anew what is still alive of files of which more than half was replaced "
        "by later commits, commit that, and remove them. The folder must not be in use.",
    )
    parser.add_argument("path", metavar="PATH", help="an offload folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_compact)


def _compact(options: argparse.Namespace) -> int:
    place = Path(options.path).expanduser()
    if not (place / JOURNAL_NAME).is_file():
        Commits(Journal(place, Files()))  # says so if it was lost
        raise CommitError(f"nothing was committed in {place}: it has no {JOURNAL_NAME}")
    done = planned_compaction(place) if options.dry_run else compact_folder(Folder(place))
    if options.json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    print(
        f"{done.files} files, {format_bytes(done.moved_bytes)} of them alive: "
        f"{'would free' if options.dry_run else 'freed'} {format_bytes(done.freed_bytes)}"
    )
    return 0
