"""The process of one arm: does what it is told, prints the numbers as JSON and nothing else."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict


def main() -> None:
    """Run the function that the first argument names."""
    told = json.loads(sys.argv[1])
    # Peers print, too; whatever they say goes to standard error.
    numbers_fd = os.dup(1)
    os.dup2(2, 1)
    module, _, function = told["work"].partition(":")
    work = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    samples = work(**told["arguments"], scratch=told["scratch"])
    with os.fdopen(numbers_fd, "w") as numbers:
        json.dump([asdict(sample) for sample in samples], numbers)


if __name__ == "__main__":
    main()
