"""Offload one module: swap its dictionaries, wrap its forward, and undo both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from diskoffload.cache import modes
from diskoffload.cache.base import Device, OffloadCache, is_cache
from diskoffload.cache.cpu import CPUCache
from diskoffload.cache.device import DeviceCache
from diskoffload.cache.disk import DiskCache
from diskoffload.errors import AlreadyOffloadedError, InvalidInputError
from diskoffload.forward import unwrap_forward, wrap_forward
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders
from diskoffload.system.devices import usable_device

_Module = TypeVar("_Module", bound=torch.nn.Module)


def is_offloaded(module: torch.nn.Module) -> bool:
    """Tell whether a module's own parameters and buffers are offloaded."""
    return cache_of(module) is not None


def cache_of(module: torch.nn.Module) -> OffloadCache | None:
    """Give the cache of an offloaded module's parameters, or ``None``."""
    parameters: object = module._parameters
    return parameters if is_cache(parameters) else None


def caches_of(module: torch.nn.Module) -> tuple[OffloadCache, OffloadCache] | None:
    """Give the caches of an offloaded module's parameters and buffers, or ``None``."""
    parameters: object = module._parameters
    buffers: object = module._buffers
    if is_cache(parameters) and is_cache(buffers):
        return parameters, buffers
    return None


KINDS: tuple[type[OffloadCache], ...] = (CPUCache, DeviceCache, DiskCache)
"""Every kind of cache there is; importing them makes ``OffloadCache.cls_from_device`` find them."""

# ---------------------------------------------------------------------- offloading


def offload_module(
    module: _Module,
    onload_device: Device,
    offload_device: Device,
    *,
    offload_dir: Folder | Path | str | None = None,
    **kwargs: Any,
) -> _Module:
    """Offload a module's own parameters and buffers, not those of its submodules.

    Reading one brings it to ``onload_device``; inputs of ``forward`` move there as well.
    The tensors' objects stay the same, their memory is given back once nothing else uses
    it.

    Args:
        module: the module; changed in place.
        onload_device: where reads bring tensors.
        offload_device: where they wait: a device, ``"cpu"`` or ``"disk"``.
        offload_dir: with ``"disk"``, the folder to write to; ``None`` takes a fresh
            temporary one that goes with its owner.
        **kwargs: for the cache: ``compression`` (disk only; see :class:`DiskCache`),
            ``name`` (the module's full name), ``residency``.

    Returns:
        The module.

    Raises:
        AlreadyOffloadedError: it is offloaded; call :func:`remove_module_offload` first.
        InvalidInputError: a device or an option that cannot be.
        StorageError: the folder cannot be used. In each case nothing was changed.
    """
    cache = cache_of(module)
    if cache is not None:
        raise AlreadyOffloadedError(
            f"{type(module).__name__} is offloaded already (to {cache.offload_device}); "
            "call remove_module_offload first, or dispatch the whole model anew"
        )
    _replace_caches(module, onload_device, offload_device, offload_dir=offload_dir, **kwargs)
    wrap_forward(module)
    return module


def attach_caches(module: torch.nn.Module, parameters: OffloadCache, buffers: OffloadCache) -> None:
    """Give a plain module the caches that take its dictionaries' place, and wrap its forward."""
    module.__dict__.update(_parameters=parameters, _buffers=buffers)
    wrap_forward(module)


def reoffload_module(
    module: torch.nn.Module,
    onload_device: Device,
    offload_device: Device,
    *,
    offload_dir: Folder | Path | str | None = None,
    **kwargs: Any,
) -> None:
    """Offload a module, or move one that is offloaded; what lies right stays where it lies."""
    cache = cache_of(module)
    if cache is None:
        offload_module(module, onload_device, offload_device, offload_dir=offload_dir, **kwargs)
        return
    if offload_device == "disk" and isinstance(cache, DiskCache):
        offload_dir = cache.folder if offload_dir is None else offload_dir
        kwargs["compression"] = kwargs.get("compression") or cache.compression
    kwargs["name"] = kwargs.get("name") or cache.name
    kwargs["residency"] = kwargs.get("residency") or cache.residency
    # Of 50,000 modules of an opened checkpoint that is most.
    if offload_device == "disk" and _are_made_with(module, onload_device, offload_dir, kwargs):
        return
    _replace_caches(module, onload_device, offload_device, offload_dir=offload_dir, **kwargs)


def _are_made_with(
    module: torch.nn.Module,
    onload_device: Device,
    offload_dir: Folder | Path | str | None,
    options: Mapping[str, Any],
) -> bool:
    """Whether a module is on disk already just as is asked for."""
    options = {"compression": None, **options, "offload_dir": offload_dir}
    device = usable_device(onload_device)
    return all(
        isinstance(cache, DiskCache) and cache.is_made_with(device, options)
        for cache in caches_of(module) or (None,)
    )


def _replace_caches(
    module: torch.nn.Module,
    onload_device: Device,
    offload_device: Device,
    *,
    offload_dir: Folder | Path | str | None,
    **kwargs: Any,
) -> None:
    made_by = OffloadCache.cls_from_device(offload_device)
    options = dict(kwargs)
    if issubclass(made_by, DiskCache):
        # Opened once, so that parameters and buffers share a temporary folder too.
        options["offload_dir"] = open_folders.at(offload_dir)
    elif options.pop("compression", None) is not None:
        raise InvalidInputError(
            f"compression is for offloading to disk, not to {offload_device}; leave it out"
        )
    old = (module._parameters, module._buffers)
    parameters = made_by(onload_device, offload_device, **options)
    buffers = parameters.like(parameters.name)
    parameters.take(old[0])
    buffers.take(old[1])
    # Past Module.__setattr__, which looks for parameters in whatever it is given.
    module.__dict__.update(_parameters=parameters, _buffers=buffers)
    for mapping in old:
        if isinstance(mapping, OffloadCache):
            mapping.detach()


def remove_module_offload(module: torch.nn.Module, onload_tensors: bool = False) -> None:
    """Make a module a plain one again; one that is plain already is left alone.

    Args:
        module: the module; changed in place, its tensors' objects stay the same.
        onload_tensors: bring every tensor to the onload device, in memory of its own.
            Otherwise each stays where it is offloaded; from disk that is a tensor that
            aliases the file's private mapping, if its bytes are there as they are, and
            costs no memory of its own.
    """
    caches = caches_of(module)
    if caches is None:
        return
    plain = [cache.release_entries(onload=onload_tensors) for cache in caches]
    module._parameters, module._buffers = plain  # type: ignore[assignment]
    unwrap_forward(module)


# ---------------------------------------------------------------------- one entry


def update_offload_parameter(module: torch.nn.Module, name: str, data: torch.Tensor) -> None:
    """Give a parameter or buffer the value that ``data`` has now, as ``copy_`` would.

    Works on offloaded and plain modules. The caller may reuse ``data`` at once, and it
    may be the very tensor that was read from the module.

    Raises:
        AttributeError: the module has no such parameter or buffer.
        RuntimeError: ``data`` cannot be broadcast to its shape.
    """
    for mapping in (module._parameters, module._buffers):
        if mapping.get(name) is None:
            continue
        if isinstance(mapping, OffloadCache):
            mapping.set_value(name, data)
        else:
            with torch.no_grad():
                mapping[name].copy_(data)  # type: ignore[union-attr]
        return
    raise AttributeError(
        f"{type(module).__name__} has no parameter or buffer {name!r} to update; "
        f"it has {sorted([*module._parameters, *module._buffers])}"
    )


def get_execution_device(
    module: torch.nn.Module, default: torch.device | None = None
) -> torch.device:
    """Tell the device on which a module's inputs should be: where it onloads to."""
    cache = cache_of(module)
    return _device_of(module, default) if cache is None else cache.onload_device


def get_offloaded_device(
    module: torch.nn.Module, default: torch.device | None = None
) -> torch.device | str:
    """Tell where a module's tensors wait: a device or ``"disk"``."""
    cache = cache_of(module)
    return _device_of(module, default) if cache is None else cache.offload_device


def _device_of(module: torch.nn.Module, default: torch.device | None) -> torch.device:
    with modes.disable_onloading():
        tensor = next(module.parameters(), next(module.buffers(), None))
    if tensor is None or tensor.is_meta:
        return torch.device("cpu") if default is None else torch.device(default)
    return tensor.device


def get_cache_init_kwargs(
    module: torch.nn.Module, default: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Give the arguments with which another module is offloaded as this one is.

    They suit :func:`offload_module` and the caches' constructors: ``onload_device``,
    ``offload_device`` and, on disk, ``offload_dir`` and ``compression``. For a plain
    module the devices are those of its tensors.
    """
    kwargs = dict(default or {})
    kwargs["onload_device"] = get_execution_device(module, kwargs.get("onload_device"))
    kwargs["offload_device"] = get_offloaded_device(module, kwargs.get("offload_device"))
    cache = cache_of(module)
    if isinstance(cache, DiskCache):
        kwargs["offload_dir"] = cache.offload_dir
        kwargs["compression"] = cache.compression
    return kwargs


def register_offload_module(base: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Add a submodule, offloaded as ``base`` is; to a plain ``base`` it is added as it is."""
    cache = cache_of(base)
    if cache is not None:
        full_name = f"{cache.name}.{name}" if cache.name else name
        for path, part in module.named_modules():
            if not is_offloaded(part):
                part_name = f"{full_name}.{path}" if path else full_name
                offload_module(part, **get_cache_init_kwargs(base), name=part_name)
    base.register_module(name, module)
