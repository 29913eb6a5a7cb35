"""Run a model from compressed shards in a small memory: a script, see its test.

``work_packed_in_group.py PACKED OFFLOAD_DIR`` prints what each pass took, and what it gave.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from measure import Measurement, measured
from work_in_group import EDITED, TOKENS

import diskoffload

KEPT_BYTES = 96 << 20
PASSES = 3


def main(source: str, offload_dir: str) -> None:
    """Open it where it lies, run it, edit a weight in place, run it again."""
    passes, outputs = [], []
    model: Any = diskoffload.open_checkpoint(
        source, offload_dir=offload_dir, max_memory=KEPT_BYTES, compression="zstd"
    )
    tokens = torch.tensor(TOKENS)
    residency = next(model.children())._parameters.residency
    kept = []
    for number in range(PASSES):
        if number == PASSES - 1:
            with torch.no_grad():
                model.get_parameter(EDITED).mul_(2)
        taken: Measurement
        with measured() as taken, torch.no_grad():
            outputs.append(model(tokens, use_cache=False).logits.float().tolist())
        passes.append(taken.as_json())
        kept.append(residency.loaded_bytes)
    print(json.dumps({"passes": passes, "outputs": outputs, "kept": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
