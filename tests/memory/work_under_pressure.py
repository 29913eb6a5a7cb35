"""Have another process take memory and leave, beside a streamed model: a script, see its test.

``work_under_pressure.py SRC OFFLOAD_DIR HOG_BYTES`` prints, as JSON, what was kept when.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from work_stream_in_group import make_model, output_of

import diskoffload

HOG = """
import sys, time
taken = []
for _ in range(int(sys.argv[1]) >> 23):
    taken.append(bytearray(8 << 20))
    taken[-1][::4096] = b"x" * 2048
    time.sleep(0.03)
print("taken", flush=True)
sys.stdin.read()
"""


def main(source: str, offload_dir: str, hog_bytes: str) -> None:
    """Do it all; the group has room for a part of the model."""
    with torch.device("meta"):
        bare = make_model()
    model: Any = diskoffload.open_checkpoint(
        source, model=bare, offload_dir=offload_dir, mode="streamed"
    )
    residency = model[0]._parameters.residency
    output_of(model)
    outputs = [output_of(model)]
    kept = [residency.loaded_bytes]
    with subprocess.Popen(
        [sys.executable, "-c", HOG, hog_bytes], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        assert hog.stdin is not None
        hog.stdout.readline()  # nobody reads the model meanwhile
        time.sleep(0.5)
        kept.append(residency.loaded_bytes)
        outputs.append(output_of(model))
        hog.stdin.close()
    for _ in range(2):
        outputs.append(output_of(model))
    kept.append(residency.loaded_bytes)
    print(json.dumps({"kept": kept, "outputs": outputs, "on": residency.streams}))


if __name__ == "__main__":
    main(*sys.argv[1:])
