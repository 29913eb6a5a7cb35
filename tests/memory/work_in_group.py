"""What test_cgroup_run.py has done in a control group: a script, run with SRC OUT OFFLOAD_DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measure import Measurement, measured

import diskoffload

EDITED = "model.layers.3.mlp.up_proj.weight"
TOKENS = ((1, 7_999, 7, 4_711),)


def main(source: str, out: str, offload_dir: str) -> None:
    """Open, run, edit in place, run and save; print what each step took as JSON."""
    taken: dict[str, Measurement] = {}
    tokens = torch.tensor(TOKENS)
    with measured() as taken["open"]:
        model: Any = diskoffload.open_checkpoint(source, offload_dir=offload_dir)
    with measured() as taken["run"], torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    with measured() as taken["edit"], torch.no_grad():
        model.get_parameter(EDITED).mul_(2)
    with measured() as taken["run again"], torch.no_grad():
        again = model(tokens, use_cache=False).logits
    with measured() as taken["save"]:
        diskoffload.save_checkpoint(model, out)
    steps = {step: one.as_json() for step, one in taken.items()}
    outputs = [one.float().tolist() for one in (logits, again)]
    print(json.dumps({"steps": steps, "outputs": outputs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
