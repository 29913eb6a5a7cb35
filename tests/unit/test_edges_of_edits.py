"""Where two mapped tensors share a page, an edit of one is told from the other's by its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from linux_only import linux_only
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.held import held_of
from diskoffload.system.files import Files
from diskoffload.system.memory import PAGE_BYTES

pytestmark = pytest.mark.usefixtures("no_leaks")


@linux_only("all bytes are compared, since no page is known to be written")
@torch.no_grad()
def test_no_more_is_read_than_the_shared_page_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a tensor was, into as much memory again."""
    net = torch.nn.Sequential(*(torch.nn.Linear(1000, 1001, bias=False) for _ in range(3)))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Sequential(*(torch.nn.Linear(1000, 1001, bias=False) for _ in range(3)))
    model = diskoffload.open_checkpoint(
        tmp_path, model=bare, offload_dir=tmp_path / "o", mode="mapped"
    )
    read: list[int] = []
    read_into = Files.read_into

    def counted(self: Files, fd: int, target: memoryview, offset: int, path: Path) -> None:
        read.append(len(target))
        read_into(self, fd, target, offset, path)

    middle = held_of(model[1].weight)
    assert middle is not None
    monkeypatch.setattr(Files, "read_into", counted)
    model[0].weight.mul_(2)
    model[2].weight.mul_(2)
    assert not middle.is_changed()
    assert 0 < sum(read) <= 2 * PAGE_BYTES
    model[1].weight.view(-1)[0] += 1  # on the page that it shares with what was edited
    assert middle.is_changed()
