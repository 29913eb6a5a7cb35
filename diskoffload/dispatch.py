"""Offload whole models: sequentially, by a plan, or by a map."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from diskoffload.cache.base import Device
from diskoffload.errors import InvalidInputError, NotOffloadedError
from diskoffload.model_plan import entries_of, module_sizes, plan_model
from diskoffload.module import (
    cache_of,
    get_cache_init_kwargs,
    get_execution_device,
    get_offloaded_device,
    is_offloaded,
    remove_module_offload,
    reoffload_module,
)
from diskoffload.planning import format_bytes
from diskoffload.progress import count_bar
from diskoffload.residency.resident import residency_for
from diskoffload.residency.streaming import Mode
from diskoffload.store.compression import Compression
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders
from diskoffload.system.collector import collector_paused
from diskoffload.system.devices import usable_device

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=torch.nn.Module)
DeviceMap = Mapping[str, tuple[Any, Any]]


def dispatch_model(
    model: _Model,
    device_memory: Mapping[Any, int] | None = None,
    extra_memory: int | None = None,
    no_split_modules: Container[str] | None = None,
    *,
    max_memory: Mapping[Any, int | float | str] | None = None,
    offload_dir: Folder | Path | str | None = None,
    compression: Compression = None,
    mode: Mode | None = None,
    show_progress: bool = False,
) -> _Model:
    """Dispatch a model for generation: as much as possible stays on the devices.

    What overflows the devices goes to RAM, what overflows RAM to disk; what lies on disk
    already and belongs there stays where it lies. Without an accelerator the CPU is the
    device. Modules are placed in the order of ``model.modules()``.

    Args:
        model: any module; changed in place. Earlier offloads are replaced.
        device_memory: bytes for each device; RAM is bounded by what is available.
        extra_memory: bytes left free on each device for activations; what the model leaves
            is added to it.
        no_split_modules: names of classes whose modules stay on one device; by default the
            model's own ``_no_split_modules``.
        max_memory: budgets by device, in place of ``device_memory``:
            ``{0: "20GiB", "cpu": "8GiB"}``. Without either, what is available is used,
            the container's limit included.
        offload_dir: folder for what goes to disk; ``None`` takes a fresh temporary one.
        compression: how what is written to disk is compressed, see :class:`DiskCache`.
        mode: how weights on disk are held that are used on the CPU, see
            :func:`diskoffload.open_checkpoint`; ``None`` leaves it as it is, at first
            ``"auto"``.
        show_progress: show a progress bar.

    Returns:
        The model.

    Raises:
        BudgetError: a module that must not be split fits no device.
        InvalidInputError: budgets given twice, or that cannot be read.
    """
    plan = plan_model(
        model,
        device_memory,
        extra_memory,
        no_split_modules,
        max_memory=max_memory,
        offload_dir=offload_dir,
    )
    _log.info("dispatching: %s", plan.reason)
    device_map: dict[str, tuple[str, str]] = {}
    for name, places in plan.device_map().items():
        for part, _ in model.get_submodule(name).named_modules(prefix=name):
            device_map.setdefault(part, places)
    dispatch_with_map(
        model,
        device_map,
        offload_dir,
        show_progress=show_progress,
        compression=compression,
        mode=mode,
    )
    for name, module in model.named_modules():
        if name not in device_map and is_offloaded(module):
            remove_module_offload(module)
    return model


@collector_paused(all_stays=True)
def dispatch_with_map(
    model: torch.nn.Module,
    device_map: DeviceMap,
    offload_dir: Folder | Path | str | None = None,
    show_progress: bool = True,
    *,
    compression: Compression = None,
    mode: Mode | None = None,
) -> None:
    """Dispatch a model by a map: module name -> (onload device, offload device).

    Only the modules that are named are touched, each without its submodules. One whose
    offload device is ``None`` stays plain; names that the model lacks are an error.

    Args:
        model: the model; changed in place.
        device_map: as :func:`get_device_map` and ``plan.device_map()`` give it.
        offload_dir: folder for modules that go to disk; ``None`` takes a fresh temporary
            one, but for those that have a folder already.
        show_progress: show a progress bar.
        compression: how what is written to disk is compressed, see :class:`DiskCache`.
        mode: see :func:`dispatch_model`.

    Raises:
        InvalidInputError: the map names modules that the model lacks, or no such mode.
    """
    residency = None if mode is None else residency_for(None, mode)
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in device_map if name not in modules]
    if unknown:
        raise InvalidInputError(
            f"the device map names {len(unknown)} modules that the model lacks, "
            f"{unknown[0]!r} among them; take the names from model.named_modules()"
        )
    done: set[int] = set()
    folder: Folder | None = None
    with count_bar(len(device_map), "Dispatching", "module", show=show_progress) as bar:
        for name, (onload, offload) in device_map.items():
            bar.update()
            module = modules[name]
            if offload is None or id(module) in done:
                continue
            done.add(id(module))
            options: dict[str, Any] = {"name": name, "residency": residency}
            if offload == "disk":
                on_disk = cache_of(module)
                if offload_dir is not None or on_disk is None or on_disk.offload_device != "disk":
                    folder = folder or open_folders.at(offload_dir)
                    options["offload_dir"] = folder
                options["compression"] = compression
            reoffload_module(module, onload, offload, **options)


def get_device_map(
    model: torch.nn.Module, default_device: torch.device | str = "cpu"
) -> dict[str, tuple[torch.device, torch.device | str]]:
    """Give every module's (onload device, offload device) by name, as it is now.

    ``default_device`` stands for modules without tensors that are not offloaded.
    """
    default = torch.device(default_device)
    return {
        name: (get_execution_device(module, default), get_offloaded_device(module, default))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def offload_model(
    model: _Model,
    onload_device: Device,
    offload_device: Device | None = None,
    *,
    offload_dir: Folder | Path | str | None = None,
    compression: Compression = None,
    mode: Mode | None = None,
) -> _Model:
    """Offload a model for sequential onloading: each layer comes when it runs, and goes.

    Args:
        model: the model; changed in place.
        onload_device: where modules run.
        offload_device: where every module waits. Without it each stays where it is, as by
            :func:`set_onload_device`.
        offload_dir: folder for ``offload_device="disk"``; ``None`` takes a fresh
            temporary one.
        compression: how what is written to disk is compressed, see :class:`DiskCache`.
        mode: see :func:`dispatch_model`.

    Returns:
        The model.
    """
    if offload_device is None:
        if offload_dir is None and compression is None and mode is None:
            set_onload_device(model, onload_device)
            return model
        offload_device = "disk"
    names = [name for name, _ in model.named_modules()]
    dispatch_with_map(
        model,
        dict.fromkeys(names, (onload_device, offload_device)),
        offload_dir,
        show_progress=False,
        compression=compression,
        mode=mode,
    )
    if _log.isEnabledFor(logging.INFO):
        tensors = dict(tensor for size in module_sizes(model) for tensor in size.tensors)
        _log.info(
            "offloading: %s wait on %s, each layer runs on %s as it is needed",
            format_bytes(sum(tensors.values())),
            offload_device,
            onload_device,
        )
    return model


def set_onload_device(
    module: torch.nn.Module, onload_device: Device
) -> tuple[bool, dict[str, Any]]:
    """Have every module of a model onload to a device; plain ones are offloaded where they are.

    An offloaded module keeps its place. A plain one with tensors is offloaded to their
    device; one without, as its first offloaded child is, else to the CPU.

    Returns:
        Whether the module was offloaded before, and the arguments that offload another
        module as it is now.
    """
    device = usable_device(onload_device)
    child_kwargs: dict[str, Any] | None = None
    for child in module.children():
        was_offloaded, kwargs = set_onload_device(child, onload_device)
        if was_offloaded and child_kwargs is None:
            child_kwargs = kwargs
    cache = cache_of(module)
    if cache is not None:
        for mapping in (module._parameters, module._buffers):
            entries: Any = mapping
            entries.onload_device = device
        return True, get_cache_init_kwargs(module)
    tensors = [value for value in entries_of(module).values() if isinstance(value, torch.Tensor)]
    if tensors:
        place = tensors[0].device
        if place.type == "meta":
            raise NotOffloadedError(
                f"{type(module).__name__} has tensors on the meta device: there is no value to "
                "offload; open the checkpoint with open_checkpoint(path, model=model)"
            )
        child_kwargs = None
        kwargs = {"onload_device": onload_device, "offload_device": place}
    else:
        kwargs = {**(child_kwargs or {"offload_device": "cpu"}), "onload_device": onload_device}
    reoffload_module(module, **kwargs)
    return not tensors and child_kwargs is not None, kwargs


def remove_dispatch(module: _Model, onload_tensors: bool = False) -> _Model:
    """Make every module plain again; see :func:`remove_module_offload`."""
    for part in module.modules():
        remove_module_offload(part, onload_tensors)
    return module
