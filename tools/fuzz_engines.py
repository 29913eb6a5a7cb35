"""Where ``fuzz.py`` takes its inputs from: libFuzzer through atheris, or random mutation."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from fuzz_targets import INSTRUMENTED, TOKENS

ATHERIS, PLAIN = "atheris", "random mutation"
MOST_INPUT_BYTES = 16 << 10


def chosen_engine(*, plain: bool) -> str:
    """Tell what makes the inputs here."""
    return PLAIN if plain or importlib.util.find_spec("atheris") is None else ATHERIS


def mutations(seeds: list[bytes], numbers: random.Random) -> Iterator[bytes]:
    """Change the seeds at random, without end; the seeds themselves come first."""
    yield from seeds
    while True:
        data = bytearray(numbers.choice(seeds))
        for _ in range(numbers.choice((1, 1, 1, 2, 3, 6))):
            start = numbers.randrange(len(data) + 1)
            stop = min(len(data), start + numbers.choice((0, 0, 1, 1, 2, 4, 16)))
            other = numbers.choice(seeds)
            begin = numbers.randrange(len(other) + 1)
            new = numbers.choice(
                (
                    b"",
                    bytes([numbers.randrange(256)]),
                    numbers.choice(TOKENS),
                    bytes(data[start : start + 24]),
                    other[begin : begin + 32],
                )
            )
            data[start:stop] = new
        yield bytes(data[:MOST_INPUT_BYTES])


def guided(
    one: Callable[[bytes], None], seconds: float, seed: int, seeds: list[bytes], place: Path
) -> None:
    """Let libFuzzer make the inputs, which ends the process."""
    atheris: Any = importlib.import_module("atheris")
    for module in INSTRUMENTED:
        _instrument(module, atheris.instrument_func)
    corpus = place / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    words = place / "words"
    escaped = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS)
    words.write_text("".join(f'"{token}"\n' for token in escaped), encoding="ascii")
    options = {
        "max_total_time": max(1, round(seconds)),
        "max_len": MOST_INPUT_BYTES,
        "seed": seed + 1,  # 0 is "by the clock"
        "dict": words,
        # Both are watched from outside; of no seconds atheris makes a timeout at once.
        "timeout": 3600,
        "rss_limit_mb": 0,
        "artifact_prefix": f"{place}/",
    }
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


def _instrument(module: ModuleType, instrument: Callable[[Any], Any]) -> None:
    owners = [module, *(one for one in vars(module).values() if isinstance(one, type))]
    for owner in owners:
        for value in list(vars(owner).values()):
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                instrument(value)
