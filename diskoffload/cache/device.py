"""Tensors that wait in an accelerator's memory."""

from __future__ import annotations

import torch

from diskoffload.cache.base import Device
from diskoffload.cache.ram import RamCache
from diskoffload.residency.resident import Residency


class DeviceCache(RamCache, kind="*"):
    """Offloads to an accelerator, usually the one that onloads: nothing moves at a read."""

    __slots__ = ("offload_device",)

    def __init__(
        self,
        onload_device: Device,
        offload_device: Device | None = None,
        *,
        name: str = "",
        residency: Residency | None = None,
    ) -> None:
        """Start empty; without ``offload_device`` tensors wait on the onload device."""
        super().__init__(onload_device, offload_device, name=name, residency=residency)
        self.offload_device = (
            self.onload_device if offload_device is None else torch.device(offload_device)
        )

    def _check_offload_device(self, offload_device: Device) -> None:
        torch.device(offload_device)
