"""Edit a model on a checkpoint that one may only read, and say what became of it.

``edit_as_other_user.py CHECKPOINT WORK USER`` becomes that user and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from ways import Net, check_same, left_memory, make_net

import diskoffload
from diskoffload.system.memory import written_pages


def main(checkpoint: Path, work: Path, user: int) -> None:
    with torch.device("meta"):
        bare = Net()
    plain = make_net()
    bare.table = plain.table.clone()
    # Only now, when all is imported: another user may not be let into a virtual environment.
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    net = diskoffload.open_checkpoint(checkpoint, model=bare.eval(), offload_dir=work / "offload")
    view = net.up.weight[3]
    with torch.no_grad():
        for one in (net, plain):
            one.up.weight.mul_(2)
            one.up.bias.data.add_(1)
            one.scale[2] = 7
            one.down.weight = torch.nn.Parameter(torch.ones(16, 64))
        left_memory(net)
        view.zero_()
        plain.up.weight[3] = 0
    del view, one
    check_same(net, plain)
    diskoffload.save_checkpoint(net, work / "out")
    saved = load_file(work / "out" / "model.safetensors")
    found = {
        "owner": os.stat(checkpoint).st_uid,
        "user": os.geteuid(),
        "pagemap": written_pages(net.norm.weight.data_ptr(), 1) is not None,
        "saved": all(torch.equal(saved[name], plain.state_dict()[name]) for name in saved),
        "writable": os.access(checkpoint / "model.safetensors", os.W_OK),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
