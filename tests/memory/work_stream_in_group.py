"""Run a model larger than memory several times, streamed or mapped: a script, see its test.

``work_stream_in_group.py SRC OFFLOAD_DIR MODE`` prints what each pass took, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measure import Measurement, measured

import diskoffload

LAYERS = 64
WIDTH = 2048
KEPT_BYTES = 160 << 20
PASSES = 4


def make_model() -> torch.nn.Sequential:
    """Build 1 GiB of equal layers."""
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def output_of(model: Any) -> list[float]:
    """Run a model on one row."""
    with torch.no_grad():
        return list(model(torch.linspace(-1, 1, WIDTH)).tolist())


def main(source: str, offload_dir: str, mode: str) -> None:
    """Do it all on a checkpoint that is larger than memory."""
    passes, kept, output = [], [], []
    with torch.device("meta"):
        bare = make_model()
    options: dict[str, Any] = {"max_memory": KEPT_BYTES} if mode == "streamed" else {}
    model: Any = diskoffload.open_checkpoint(source, model=bare, offload_dir=offload_dir, **options)
    residency = model[0]._parameters.residency
    for _ in range(PASSES):
        taken: Measurement
        with measured() as taken:
            output = output_of(model)
        passes.append(taken.as_json())
        if mode == "streamed":
            kept.append(residency.loaded_bytes)
        else:
            kept.append(residency._mapped._present.nbytes)
    print(json.dumps({"passes": passes, "kept": kept, "output": output, "on": residency.streams}))


if __name__ == "__main__":
    main(*sys.argv[1:])
