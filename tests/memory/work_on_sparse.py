"""What test_sparse_file.py has done by a process that it can end: a script, run with PATH ROWS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measure import Measurement, measured

import diskoffload

COLUMNS = 1 << 20


class Huge(torch.nn.Module):
    """Two matrices, of which a few numbers are looked at."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.empty(rows, COLUMNS, dtype=torch.bfloat16))
        self.second = torch.nn.Parameter(torch.empty(rows, COLUMNS, dtype=torch.bfloat16))


def opened(path: Path, rows: int) -> torch.nn.Module:
    with torch.device("meta"):
        model = Huge(rows)
    return diskoffload.open_checkpoint(path, model=model, offload_dir=path.parent / "offload")


def main(path: Path, rows: int) -> None:
    """Open, read the ends and the middles, edit two numbers; print what was found as JSON."""
    opened(path, rows)  # what python imports meanwhile is not to be measured
    found: dict[str, Any] = {}
    taken: dict[str, Measurement] = {}
    with measured() as taken["reading"]:
        model = opened(path, rows)
        for name in ("first", "second"):
            weight = model.get_parameter(name)
            found[name] = {
                "shape": list(weight.shape),
                "end": weight[-1, -4:].tolist(),
                "middle": weight[rows // 2, COLUMNS // 3].item(),
            }
            del weight
    with measured() as taken["editing"], torch.no_grad():
        model.get_parameter("first")[-1, -2:] = 7.0
        found["edited"] = model.get_parameter("first")[-1, -4:].tolist()
    for step, one in taken.items():
        found[step] = one.as_json()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
