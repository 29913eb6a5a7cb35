"""Accelerators as torch shows them: what memory is free, and copies beside the computation.

Written after torch's notes on CUDA semantics (https://docs.pytorch.org/docs/stable/notes/cuda.html,
"CUDA streams" and "Use pinned memory buffers"); ROCm devices are torch's ``cuda`` too, and
``xpu`` has the same calls. Never run on hardware so far: there was none.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

_WITH_STREAMS = ("cuda", "xpu")


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""


class Lane(Protocol):
    """A way to a device beside its computation; see :class:`StreamLane`."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """Give bytes of the host that the device can copy from by itself."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Give bytes of the device, for this lane to fill."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Begin to copy; ``source`` may be used again after the event."""

    def hand_over(self, tensor: torch.Tensor, event: Event) -> None:
        """Have whoever computes now wait for the event before it uses the tensor."""


class StreamLane:
    """A side stream of one device. For one thread, but for :meth:`hand_over`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def staging(self, nbytes: int) -> torch.Tensor:
        """Give pinned bytes of the host."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Give bytes of the device out of the side stream's own pool."""
        with self._module.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copy on the side stream."""
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event: Event = self._module.Event()
            event.record(self._stream)  # type: ignore[attr-defined]
        return event

    def hand_over(self, tensor: torch.Tensor, event: Event) -> None:
        """Have the current stream wait, and the memory be its as well until it is freed."""
        current = self._module.current_stream(self._device)
        current.wait_event(event)
        tensor.record_stream(current)


class Accelerators:
    """This machine's accelerators. Stateless and thread-safe."""

    def is_one(self, device: torch.device) -> bool:
        """Whether a device has memory of its own."""
        return device.type not in ("cpu", "meta")

    def available_bytes(self, device: torch.device) -> int | None:
        """Tell what of a device's memory could be had; ``None`` where torch cannot say.

        What torch's own allocator holds and does not use counts as free.
        """
        module: Any = torch.get_device_module(device)
        if device.type == "mps":
            return int(module.recommended_max_memory() - module.driver_allocated_memory())
        if not hasattr(module, "mem_get_info"):
            return None
        free_bytes, _ = module.mem_get_info(device)
        idle_bytes = module.memory_reserved(device) - module.memory_allocated(device)
        return int(free_bytes + idle_bytes)

    def lane(self, device: torch.device) -> Lane | None:
        """Make a way to a device beside its computation; ``None`` where torch has none."""
        return StreamLane(device) if device.type in _WITH_STREAMS else None
