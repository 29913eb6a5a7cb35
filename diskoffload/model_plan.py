"""Measure a model's modules and plan where each should be; nothing is moved here."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import OffloadCache
from diskoffload.cache.modes import disable_onloading
from diskoffload.errors import InvalidInputError
from diskoffload.module import cache_of
from diskoffload.planning import ModuleSize, Plan, parse_max_memory, plan_dispatch
from diskoffload.store.folder import Folder
from diskoffload.system.files import free_bytes
from diskoffload.system.headroom import Headroom

# compressed-tensors' own reserve for what is no weight: a share of the model, at least 1 GB.
_EXTRA_SHARE = 0.05
_EXTRA_LEAST_BYTES = 10**9
_ACTIVATION_TOKENS = 2048
# Of a budget that the user has set, at most this share is reserved without being asked.
_EXTRA_OF_BUDGET = 0.1
# Of what the machine has, this share is left to others when nobody has set a budget.
_LEFT_TO_OTHERS = 0.1


def module_sizes(model: torch.nn.Module, no_split_modules: Container[str] = ()) -> list[ModuleSize]:
    """Measure the modules that are placed as a whole, in module order; nothing is onloaded.

    Those are the modules with tensors of their own and the ones whose class
    ``no_split_modules`` names.
    """
    sizes: list[ModuleSize] = []

    def visit(name: str, module: torch.nn.Module) -> None:
        whole = type(module).__name__ in no_split_modules
        whole = whole or any(value is not None for value in entries_of(module).values())
        if not whole:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)
            return
        tensors: dict[int, int] = {}
        for part in module.modules():
            tensors.update(_tensor_sizes(part))
        if tensors:
            sizes.append(ModuleSize(name, sum(tensors.values()), tuple(tensors.items())))

    visit("", model)
    return sizes


def entries_of(module: torch.nn.Module) -> dict[str, object]:
    """List a module's own parameters and buffers, or their entries where they are offloaded."""
    found: dict[str, object] = {}
    for mapping in (module._parameters, module._buffers):
        entries: Any = mapping
        found.update(entries.held_items() if isinstance(entries, OffloadCache) else entries)
    return found


def _tensor_sizes(module: torch.nn.Module) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for entry in entries_of(module).values():
        if isinstance(entry, torch.Tensor):
            sizes[id(entry)] = entry.numel() * entry.dtype.itemsize
        elif entry is not None:
            # A tie of a plain and an offloaded module shows one object and one entry.
            tensor = getattr(entry, "tensor", None)
            sizes[id(entry if tensor is None else tensor)] = getattr(entry, "nbytes", 0)
    return sizes


def plan_model(
    model: torch.nn.Module,
    device_memory: Mapping[Any, int] | None = None,
    extra_memory: int | None = None,
    no_split_modules: Container[str] | None = None,
    *,
    max_memory: Mapping[Any, int | float | str] | None = None,
    offload_dir: Folder | Path | str | None = None,
) -> Plan:
    """Plan what :func:`dispatch_model` would do, and do nothing; print the result to see it.

    The arguments are those of :func:`dispatch_model`.
    """
    if device_memory is not None and max_memory is not None:
        raise InvalidInputError(
            "both device_memory and max_memory were given; name the budgets once, "
            'as max_memory={0: "20GiB", "cpu": "8GiB"}'
        )
    if no_split_modules is None:
        no_split_modules = getattr(model, "_no_split_modules", None) or ()
    devices, cpu_bytes, disk_bytes = _budgets(device_memory, max_memory)
    sizes = module_sizes(model, no_split_modules)
    if not sizes:
        raise InvalidInputError(
            f"{type(model).__name__} has no parameters or buffers, so there is nothing to dispatch"
        )
    if disk_bytes is None and offload_dir is not None:
        folder = offload_dir.path if isinstance(offload_dir, Folder) else Path(offload_dir)
        disk_bytes = free_bytes(folder.expanduser().absolute()) + _on_disk_bytes(model)
    if extra_memory is None:
        extra_memory = _default_extra_bytes(model, sizes)
        if device_memory is None:
            extra_memory = min(extra_memory, int(min(devices.values()) * _EXTRA_OF_BUDGET))
    return plan_dispatch(
        sizes, devices, cpu_bytes, extra_bytes=int(extra_memory), disk_bytes=disk_bytes
    )


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # one is available
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]


def _budgets(
    device_memory: Mapping[Any, int] | None,
    max_memory: Mapping[Any, int | float | str] | None,
) -> tuple[dict[str, int], int | None, int | None]:
    accelerators = _accelerators()
    cpu_bytes = int(Headroom().available_bytes() * (1 - _LEFT_TO_OTHERS))
    if device_memory is not None:
        return {str(device): size for device, size in device_memory.items()}, cpu_bytes, None
    if max_memory is not None:
        budget = parse_max_memory(max_memory, accelerators=accelerators)
        devices = budget.devices or {"cpu": budget.cpu_bytes or cpu_bytes}
        return devices, budget.cpu_bytes or cpu_bytes, budget.disk_bytes
    devices = {name: torch.get_device_module(name).mem_get_info(name)[0] for name in accelerators}
    return devices or {"cpu": cpu_bytes}, cpu_bytes, None


def _default_extra_bytes(model: torch.nn.Module, sizes: list[ModuleSize]) -> int:
    extra = max(int(sum(size.size_bytes for size in sizes) * _EXTRA_SHARE), _EXTRA_LEAST_BYTES)
    width = getattr(getattr(model, "config", None), "intermediate_size", None)
    if isinstance(width, int):
        with disable_onloading():
            dtype = getattr(model, "dtype", torch.bfloat16)
        extra += _ACTIVATION_TOKENS * width * dtype.itemsize
    return extra


def _on_disk_bytes(model: torch.nn.Module) -> int:
    sizes: dict[int, int] = {}
    for module in model.modules():
        cache = cache_of(module)
        if cache is not None and cache.offload_device == "disk":
            sizes.update(_tensor_sizes(module))
    return sum(sizes.values())
