"""Read a mapped model as a user who does not own its file: a script, see its test.

``work_as_another_user.py FILE OFFLOAD_DIR`` begins as root and goes on as nobody. Between two
passes and the end it waits for a line.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch

import diskoffload
from diskoffload.residency.allowance import Allowance

MIB = 1 << 20
NOBODY = 65534
PR_SET_DUMPABLE = 4  # linux/prctl.h
LAYERS, WIDTH = 24, 1024


def main(file: str, offload_dir: str) -> None:
    """Do it all."""
    torch.ones(8, 8).sum()  # what is imported late, nobody may not be able to read
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # Else /proc/self belongs to root, as after any change of user.
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    assert not os.access(file, os.W_OK)
    Allowance.free_bytes = lambda self: 50 * MIB  # type: ignore[method-assign]
    with torch.device("meta"):
        bare = torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )
    model: Any = diskoffload.open_checkpoint(
        file, model=bare, offload_dir=offload_dir, mode="mapped"
    )
    with torch.no_grad():
        for _ in range(2):
            sums = [float(layer.weight.sum()) for layer in model]
    print(sums == [n * WIDTH * WIDTH for n in range(LAYERS)], flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
