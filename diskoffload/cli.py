"""The ``diskoffload`` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.cli_folder import add_folder_commands
from diskoffload.cli_packing import add_packing_commands
from diskoffload.cli_stop import stop_on_interrupt
from diskoffload.errors import OffloadError
from diskoffload.integrations.quantization import SCHEMES
from diskoffload.quantize import (
    Interrupted,
    QuantizeResult,
    plan_quantization,
    quantize_checkpoint,
)
from diskoffload.quantize.plan import DTYPES
from diskoffload.system.memory import anonymous_bytes_of_process

_FAILED, _INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status.

    0: done. 1: it could not be done, one line on standard error says why. 2: the arguments
    are off. 130: interrupted; what was done is kept where the message says.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s"
    )
    logging.getLogger("diskoffload").setLevel(logging.INFO)
    try:
        status: int = options.run(options)
        return status
    except Interrupted as stopped:
        print(f"diskoffload: {stopped}", file=sys.stderr)
        return _INTERRUPTED
    except KeyboardInterrupt:
        print("diskoffload: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; let no traceback follow at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OffloadError as error:
        print(f"diskoffload: {error}", file=sys.stderr)
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diskoffload",
        description="Quantize, compress, look at and check models that do not fit in memory.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more of what is done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    add_packing_commands(commands)
    add_folder_commands(commands)
    return parser


def _add_quantize(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="quantize a checkpoint, some MiB of a weight in memory at a time",
        description=(
            "Quantize a checkpoint, data-free and round-to-nearest, straight from its files. "
            "The result loads in transformers and vLLM (format: compressed-tensors). Stopped "
            "with Ctrl-C it ends the weight in hand; stopped by that, a kill or a power cut, the "
            "same command goes on, from at most 256 MiB or 30 seconds before."
        ),
    )
    quantize.add_argument("source", metavar="SRC", help="the checkpoint's folder; only read")
    quantize.add_argument("out", metavar="OUT", help="the result's folder; must not exist yet")
    quantize.add_argument("--scheme", required=True, metavar="|".join(SCHEMES), help="how")
    quantize.add_argument(
        "--ignore",
        action="append",
        metavar="NAME",
        help="a module that stays as it is, or re:PATTERN; may be given several times "
        "(default: lm_head; an empty NAME ignores nothing)",
    )
    quantize.add_argument(
        "--dtype",
        metavar="|".join(DTYPES),
        help="do as if the checkpoint were stored in that dtype (default: as it is stored)",
    )
    quantize.add_argument(
        "--max-memory", metavar="SIZE", help="memory to take at most; refused if it is too little"
    )
    quantize.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest file of the result (default: %(default)s)",
    )
    quantize.add_argument(
        "--offload-dir",
        metavar="DIR",
        help="accepted for scripts; weights go straight from SRC to OUT.partial, so no scratch "
        "folder is needed and nothing is written there",
    )
    quantize.add_argument(
        "--dry-run", action="store_true", help="say what would be read, written and needed"
    )
    quantize.add_argument("--json", action="store_true", help="print the result as JSON")
    quantize.set_defaults(run=_quantize)


def _quantize(options: argparse.Namespace) -> int:
    ignore = ["lm_head"] if options.ignore is None else [one for one in options.ignore if one]
    chosen: dict[str, Any] = {
        "ignore": ignore,
        "max_memory": options.max_memory,
        "max_shard_size": options.max_shard_size,
        "dtype": options.dtype,
    }
    if options.dry_run:
        plan = plan_quantization(options.source, options.out, options.scheme, **chosen)
        print(json.dumps(plan.as_json(), indent=1) if options.json else plan)
        return 0
    started_seconds = time.monotonic()
    with stop_on_interrupt("weight") as stop:
        result = quantize_checkpoint(
            options.source,
            options.out,
            options.scheme,
            **chosen,
            show_progress=not options.json and sys.stderr.isatty(),
            stop=stop,
        )
    _report(result, time.monotonic() - started_seconds, as_json=options.json)
    return 0


def _report(result: QuantizeResult, seconds: float, *, as_json: bool) -> None:
    anonymous = anonymous_bytes_of_process()
    plan = result.plan
    if as_json:
        measured = {"seconds": seconds, "resumed": result.resumed, "anonymous_bytes": anonymous}
        print(json.dumps({**plan.as_json(), **measured}, indent=1))
        return
    if plan.is_made:
        print(f"{result.out} is the result of this very command already: nothing was left to do")
        return
    print(
        f"{plan.scheme}: {len(plan.quantized)} weights quantized, {len(plan.copied)} tensors "
        f"copied; {format_bytes(plan.read_bytes)} -> {format_bytes(plan.written_bytes)} in "
        f"{seconds:.1f} s; {result.out}"
    )
    if plan.dtype is not None:
        print(f"{len(plan.converted)} tensors were converted for {plan.dtype}")
    if result.resumed:
        print(f"{result.resumed} tensors were done by an earlier run")


if __name__ == "__main__":
    sys.exit(main())
