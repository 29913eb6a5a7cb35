"""Train adapters over a frozen base, then edit all of it in place: a script, see its test.

``work_edit_in_group.py SRC OFFLOAD_DIR`` prints what each step took, as JSON.
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

TOKENS = ((1, 7_999, 7, 4_711),)


class Adapted(torch.nn.Module):
    """A frozen linear layer with a trainable low-rank addition."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 4, bias=False, dtype=torch.bfloat16)
        self.up = torch.nn.Linear(4, base.out_features, bias=False, dtype=torch.bfloat16)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.base(value) + self.up(self.down(value))


def adapt(model: Any) -> list[torch.nn.Parameter]:
    """Put an adapter on every query projection; give what is trained."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    trained: list[torch.nn.Parameter] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        trained += [layer.self_attn.q_proj.down.weight, layer.self_attn.q_proj.up.weight]
    return trained


def train(model: Any, trained: list[torch.nn.Parameter]) -> list[float]:
    """Take two steps; give the losses."""
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    tokens = torch.tensor(TOKENS)
    losses = []
    for _ in range(2):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def double(model: Any) -> None:
    """Edit every linear layer of the base in place; nobody holds the weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(2)


def main(source: str, offload_dir: str) -> None:
    """Do it all on a checkpoint that is larger than memory."""
    taken: dict[str, Measurement] = {}
    with measured() as taken["open"]:
        model: Any = diskoffload.open_checkpoint(source, offload_dir=offload_dir)
    with measured() as taken["train"]:
        losses = train(model, adapt(model))
    with measured() as taken["edit"]:
        double(model)
    with measured() as taken["run"], torch.no_grad():
        logits = model(torch.tensor(TOKENS), use_cache=False).logits.float()
    steps = {step: one.as_json() for step, one in taken.items()}
    print(json.dumps({"steps": steps, "losses": losses, "logits": logits.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
