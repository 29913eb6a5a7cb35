"""What test_cgroup_loop.py has done in a control group: the README's loop, run with SRC OUT DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measure import Measurement, measured

import diskoffload

STEP_ROWS = 512


@torch.no_grad()
def halved(weight: torch.Tensor) -> torch.Tensor:
    """Compute a new weight of the same size, some rows at a time."""
    result = torch.empty_like(weight)
    for start in range(0, len(weight), STEP_ROWS):
        result[start : start + STEP_ROWS] = weight[start : start + STEP_ROWS].float() / 2
    return result


def main(source: str, out: str, offload_dir: str) -> None:
    """Open, replace every linear layer's weight, save; print what each step took as JSON."""
    taken: dict[str, Measurement] = {}
    with measured() as taken["open"]:
        model = diskoffload.open_checkpoint(source, offload_dir=offload_dir)
    with measured() as taken["loop"]:
        for _, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(halved(module.weight), requires_grad=False)
    with measured() as taken["save"]:
        diskoffload.save_checkpoint(model, out)
    print(json.dumps({step: one.as_json() for step, one in taken.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
