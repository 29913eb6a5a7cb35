"""Have modules in memory, on a device, for the length of a context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from diskoffload.cache import modes
from diskoffload.cache.base import Device
from diskoffload.module import caches_of
from diskoffload.system.devices import usable_device


@contextmanager
def align_modules(
    modules: torch.nn.Module | Iterable[torch.nn.Module], execution_device: Device | None = None
) -> Iterator[None]:
    """Keep several modules' tensors where they are fetched to; see :func:`align_module_device`."""
    listed = [modules] if isinstance(modules, torch.nn.Module) else list(modules)
    with ExitStack() as stack:
        for module in listed:
            stack.enter_context(align_module_device(module, execution_device))
        yield


@contextmanager
def align_module_device(
    module: torch.nn.Module, execution_device: Device | None = None
) -> Iterator[None]:
    """Keep a module's own tensors, once fetched, on a device until the context ends.

    Edits made meanwhile stay, of an offloaded module and of a plain one.

    Args:
        module: offloaded or plain.
        execution_device: the device; by default the one it onloads to, or is on.
    """
    caches = caches_of(module)
    device = None if execution_device is None else usable_device(execution_device)
    if caches is not None:
        before = [cache.onload_device for cache in caches]
        try:
            for cache in caches:
                cache.onload_device = device or cache.onload_device
            with modes.disable_offloading():
                yield
        finally:
            for cache, onload_device in zip(caches, before, strict=True):
                cache.onload_device = onload_device
        return
    if device is None:
        yield
        return
    mappings = (module._parameters, module._buffers)
    before_by_tensor = [
        (tensor, tensor.device) for one in mappings for tensor in one.values() if tensor is not None
    ]
    try:
        for tensor, _ in before_by_tensor:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, original in before_by_tensor:
            tensor.data = tensor.data.to(original)
