"""Tensors that wait in RAM."""

from __future__ import annotations

import torch

from diskoffload.cache.ram import RamCache


class CPUCache(RamCache, kind="cpu"):
    """Offloads to RAM. Where the CPU is the onload device, reads give the tensors themselves."""

    __slots__ = ()

    offload_device = torch.device("cpu")
